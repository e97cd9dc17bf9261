"""Start a server from its options: load the engine, compile its programs, open the port."""

import contextlib
import functools
import os
import socket
import time
from typing import Any, NamedTuple

import jax

from t5x_inference_ext import distributed
from t5x_inference_ext.compilation_cache import CacheOptions, use_compilation_cache
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.ranking import PromptRanker
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import config_for
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import pop_options, takes_options
from t5x_inference_ext.rendezvous import ProcessOptions
from t5x_inference_ext.runs import loading, memory
from t5x_inference_ext.runs.infer_options import InferOptions
from t5x_inference_ext.runs.progress import print_on_main
from t5x_inference_ext.runs.receipt import make_receipt
from t5x_inference_ext.server import processes
from t5x_inference_ext.server.access import is_loopback, read_keys
from t5x_inference_ext.server.bodies import MAX_TOP
from t5x_inference_ext.server.driver import Driver
from t5x_inference_ext.server.http_server import HttpServer, bind
from t5x_inference_ext.server.lockstep import StepInbox
from t5x_inference_ext.server.options import NOT_SERVED, ServerOptions
from t5x_inference_ext.server.request_log import RequestLog
from t5x_inference_ext.server.service import Service
from t5x_inference_ext.server.translation import Translator
from t5x_inference_ext.text.settings import TextSettings
from t5x_inference_ext.text.vocabulary_files import choose_settings

_CLOSE_SECONDS = 1  # seconds for the engine's thread to end


@takes_options(InferOptions, skip=NOT_SERVED)
@takes_options(ServerOptions)
@takes_options(ProcessOptions)
def run_server(
  *, config: ModelConfig | None = None, options_of_cache: CacheOptions | None = None, **options: Any
) -> None:
  """Serve until SIGTERM.

  Args:
    config: Model that the checkpoint must hold; None: any.
    options_of_cache: Options of the compilation cache; None: the defaults of CacheOptions.
    **options: Options of InferOptions, ServerOptions and ProcessOptions, by their names.

  Raises:
    UserError: Anything that the user can fix. Raised before weights are loaded.
  """
  processes_of_run = pop_options(ProcessOptions, options)
  server = pop_options(ServerOptions, options)
  model = InferOptions(config=config, **options)
  distributed.initialize(processes_of_run)
  use_compilation_cache(options_of_cache or CacheOptions(), print_on_main)
  with contextlib.ExitStack() as stack:
    with distributed.together():
      keys = read_keys(server)
      listener = stack.enter_context(bind(server)) if distributed.is_main() else None
      opened = loading.open_model(model)
      checkpoint, mesh, _ = opened
      vocab_size = checkpoint.config.vocab_size
      settings = choose_settings(server.vocabulary, checkpoint.text, vocab_size, needed=False)
      _check_sizes(model, server, opened)
    distributed.check_same(options=(model, server), checkpoint=checkpoint.notes)
    print_on_main(f'vocabulary: {settings}')
    if settings.chat is None:
      print_on_main('chat: the checkpoint has no chat template, so /v1/chat/completions is refused')
    if not keys and not is_loopback(server.host):
      print_on_main(
        f'warning: anyone who reaches {server.host} may use this server: give --api_key_file'
      )
    engine = loading.load_engine(model, checkpoint, mesh)
    served = make_served(engine, settings, model, server)
    compile_programs(served)
    if listener is None:
      processes.follow(served.scheduler, served.inbox, served.ranker.rank)
    else:
      _serve(make_service(served, settings, server), listener)


class ServedEngine(NamedTuple):
  """An engine, with its scheduler and ranker.

  Attributes:
    engine: The engine.
    scheduler: The scheduler.
    inbox: The scheduler's inbox.
    ranker: Scores prompts.
  """

  engine: Engine
  scheduler: Scheduler
  inbox: StepInbox
  ranker: PromptRanker


def make_served(
  engine: Engine, settings: TextSettings, model: InferOptions, server: ServerOptions
) -> ServedEngine:
  """Return an engine with its scheduler for a server."""
  config = config_for(
    engine.model,
    (),
    slots=model.batch_size,
    max_length=server.max_length,
    prefill_chunk=model.prefill_chunk,
    prefill_budget=model.prefill_budget,
    speculate=model.speculate,
    top_log_probs=min(MAX_TOP, engine.model.config.vocab_size),
  )
  inbox = StepInbox()
  scheduler = Scheduler(
    engine.model,
    engine.weights,
    config,
    vocabulary=settings.vocabulary,
    inbox=inbox,
    adapters=engine.adapters,
  )
  return ServedEngine(engine, scheduler, inbox, PromptRanker(scheduler, engine.weights))


def compile_programs(served: ServedEngine) -> int:
  """Compile all programs that requests can need; print and return how many."""
  print_on_main('compiling: the port opens after this')
  begin = time.monotonic()
  programs = [*served.scheduler.warm_up(), served.ranker.warm_up()]
  print_on_main(f'compiled: {len(programs)} programs in {time.monotonic() - begin:.1f} s')
  return len(programs)


def make_service(
  served: ServedEngine,
  settings: TextSettings,
  options: ServerOptions,
  log: RequestLog | None = None,
) -> Service:
  """Return the service. The driver's thread does not run yet."""
  engine, checkpoint = served.engine, served.engine.checkpoint
  name = options.model_name or os.path.basename(os.path.normpath(checkpoint.path))
  if name in engine.adapters.prompts:
    raise RequestError(f'model_name={name} is also the name of an adapter: give another one')
  return Service(
    Driver(served.scheduler, served.inbox, served.ranker.rank),
    Translator(settings, engine.model.config.vocab_size, options.max_length, engine.adapters),
    name,
    checkpoint.weights,
    options,
    log or RequestLog(),
    functools.partial(make_receipt, engine),
  )


def _serve(service: Service, listener: socket.socket) -> None:
  """Serve until SIGTERM, then end the engine in all processes."""
  server, driver = HttpServer(service, print_on_main), service.driver
  if jax.process_count() > 1:
    processes.watch_others(driver.fail_soon)
  try:
    server.run([listener])
  finally:
    ended = driver.close(_CLOSE_SECONDS)
    service.log.close()
  print_on_main('ended')
  if not ended or driver.error is not None:
    # The thread waits for a device or for a lost process, so only os._exit can end it.
    os._exit(int(driver.error is not None))


def _check_sizes(model: InferOptions, server: ServerOptions, opened: loading.OpenModel) -> None:
  """Raise RequestError if max_length exceeds the model's positions, or the run the memory."""
  most = opened.checkpoint.config.num_positions
  if most is not None and server.max_length > most:
    raise RequestError(
      f'max_length={server.max_length} is more than the {most} positions of this model: lower it'
    )
  memory.check_fits(model, opened, model.batch_size, server.max_length)
