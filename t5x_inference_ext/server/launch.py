"""Start a server from its options: load the engine, compile its programs, open the port."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import os
import socket
import time
from typing import Any, NamedTuple

import jax

from t5x_inference_ext import distributed
from t5x_inference_ext.checkpoints import Checkpoint
from t5x_inference_ext.compilation_cache import CacheOptions, use_compilation_cache
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.ranking import PromptRanker
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import config_for
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.options import takes_options
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
from t5x_inference_ext.server.service import Facts, Service
from t5x_inference_ext.server.translation import Translator
from t5x_inference_ext.text.settings import TextSettings
from t5x_inference_ext.text.vocabulary_files import choose_settings

_CLOSE_SECONDS = 1  # seconds for the engine's thread to end

_Say = Callable[[str], None]


@takes_options(InferOptions, skip=NOT_SERVED)
@takes_options(ServerOptions)
@takes_options(ProcessOptions)
def run_server(
  *,
  config: ModelConfig | None = None,
  options_of_cache: CacheOptions | None = None,
  say: _Say = print_on_main,
  **options: Any,
) -> None:
  """Serve until SIGTERM.

  Args:
    config: Model that the checkpoint must hold; None: any.
    options_of_cache: Options of the compilation cache; None: the defaults of CacheOptions.
    say: Prints a line.
    **options: Options of InferOptions, ServerOptions and ProcessOptions, by their names.

  Raises:
    UserError: Anything that the user can fix. Raised before weights are loaded.
  """
  processes_of_run = _taken(ProcessOptions, options)
  server = _taken(ServerOptions, options)
  model = InferOptions(config=config, **options)
  distributed.initialize(processes_of_run)
  use_compilation_cache(options_of_cache or CacheOptions(), say)
  with contextlib.ExitStack() as stack:
    with distributed.together():
      keys = read_keys(server)
      listener = stack.enter_context(bind(server)) if distributed.is_main() else None
      checkpoint, mesh = loading.open_model(model, say)
      vocab_size = checkpoint.config.vocab_size
      settings = choose_settings(server.vocabulary, checkpoint.text, vocab_size, needed=False)
      _check_sizes(model, server, checkpoint, mesh)
    distributed.check_same(options=(model, server), checkpoint=checkpoint.notes)
    say(f'vocabulary: {settings}')
    if settings.chat is None:
      say('chat: the checkpoint has no chat template, so /v1/chat/completions is refused')
    if not keys and not is_loopback(server.host):
      say(f'warning: anyone who reaches {server.host} may use this server: give --api_key_file')
    engine = loading.load_engine(model, checkpoint, mesh, say)
    served = make_served(engine, settings, model, server)
    compile_programs(served, say)
    if listener is None:
      processes.follow(served.scheduler, served.inbox, served.ranker.rank)
    else:
      _serve(make_service(served, settings, server), listener, say)


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


def compile_programs(served: ServedEngine, say: _Say) -> None:
  """Compile all programs that requests can need, and print how many."""
  say('compiling: the port opens after this')
  begin = time.monotonic()
  programs = [*served.scheduler.warm_up(), served.ranker.warm_up()]
  say(f'compiled: {len(programs)} programs in {time.monotonic() - begin:.1f} s')


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
    Facts(name, checkpoint.weights),
    options,
    log or RequestLog(),
    functools.partial(make_receipt, engine),
  )


def _serve(service: Service, listener: socket.socket, say: _Say) -> None:
  """Serve until SIGTERM, then end the engine in all processes."""
  server, driver = HttpServer(service, say), service.driver
  if jax.process_count() > 1:
    processes.watch_others(driver.fail_soon)
  try:
    server.run_until_stopped(listener)
  finally:
    ended = driver.close(_CLOSE_SECONDS)
    service.log.close()
  say('ended')
  if not ended or driver.error is not None:
    # The thread waits for a device or for a lost process, so only os._exit can end it.
    os._exit(int(driver.error is not None))


def _check_sizes(
  model: InferOptions, server: ServerOptions, checkpoint: Checkpoint, mesh: jax.sharding.Mesh
) -> None:
  """Raise RequestError if max_length or the cache exceeds the model's positions or the memory."""
  most = checkpoint.config.num_positions
  if most is not None and server.max_length > most:
    raise RequestError(
      f'max_length={server.max_length} is more than the {most} positions of this model: lower it'
    )
  memory.check_cache_fits(
    checkpoint.config, mesh, model.cache or model.dtype, model.batch_size, server.max_length
  )


def _taken(kind: type, options: dict[str, Any]) -> Any:
  """Build a dataclass from `options`, and remove its fields from them."""
  names = [each.name for each in dataclasses.fields(kind) if each.name in options]
  return kind(**{name: options.pop(name) for name in names})
