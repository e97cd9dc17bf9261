"""Replay of a receipt: runs its request again and compares the tokens."""

import dataclasses
import itertools

from t5x_inference_ext import distributed
from t5x_inference_ext.checkpoints import Checkpoint
from t5x_inference_ext.checkpoints.adapters.adapter import Adapter
from t5x_inference_ext.checkpoints.identity import weights_identity
from t5x_inference_ext.engine.adapters import AdapterNames, read_adapters
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.grammars import Grammars
from t5x_inference_ext.engine.inputs import check_tokens
from t5x_inference_ext.engine.request import Request, Sample, SampleCollector
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.engine.scheduler_config import config_for
from t5x_inference_ext.engine.serve import serve
from t5x_inference_ext.engine.slot_params import slot_row
from t5x_inference_ext.errors import RequestError, printable
from t5x_inference_ext.runs import loading, memory
from t5x_inference_ext.runs.infer_options import InferOptions
from t5x_inference_ext.runs.progress import print_on_main
from t5x_inference_ext.runs.receipt import EngineSetting, versions
from t5x_inference_ext.runs.receipt_file import Receipt
from t5x_inference_ext.text.vocabulary import Vocabulary
from t5x_inference_ext.text.vocabulary_files import choose_settings


def replay(receipt: Receipt, options: InferOptions, vocabulary: str | None = None) -> bool:
  """Run the request of a receipt again; print for each sample whether its tokens are equal.

  Args:
    receipt: The receipt.
    options: Checkpoint, mesh, layouts and dtypes to run on. Other options are the receipt's.
    vocabulary: Value of the option --vocabulary, for stop texts and grammars.

  Returns:
    Whether all tokens and finish reasons are equal.

  Raises:
    UserError: The receipt belongs to other weights, or its request does not fit the model. Raised
      before weights are loaded.
  """
  with distributed.together():
    model = loading.open_model(options)
    checkpoint, mesh, _ = model
    _check_weights(receipt, checkpoint)
    request, config = receipt.request, checkpoint.config
    _check_request(request, config.vocab_size)
    needed = bool(request.stop_texts) or request.grammar is not None
    settings = choose_settings(vocabulary, checkpoint.text, config.vocab_size, needed=needed)
    Grammars(settings.vocabulary, config.vocab_size).matchers(request.grammar, 1)  # checks it
    adapters = _adapter(receipt, checkpoint, options)
    request = dataclasses.replace(request, adapter=next(iter(adapters), None))
    names = AdapterNames.of(adapters, config.vocab_size)
    rows, positions = len(request.seeds), len(names.prompted(request).tokens) + request.limit
    memory.check_fits(options, model, min(options.batch_size, rows), positions)
  distributed.check_same(options=options, receipt=receipt, checkpoint=checkpoint.notes)
  engine = loading.load_engine(options, checkpoint, mesh, adapters)
  loading.say_compiling(engine)
  samples = _run(engine, request, settings.vocabulary, options.batch_size)
  for line in _different_settings(receipt, engine):
    print_on_main(line)
  equal = True
  for i, (sample, (tokens, finish)) in enumerate(zip(samples, receipt.samples)):
    verdict = _compare(sample, tokens, finish)
    print_on_main(
      f'sample {i}: {verdict or f"all {len(tokens)} tokens are equal, and the end: {finish}"}'
    )
    equal &= not verdict
  return equal


def _check_weights(receipt: Receipt, checkpoint: Checkpoint) -> None:
  """Raise RequestError if the receipt was made with other weights than the checkpoint's."""
  found = weights_identity(checkpoint)
  if found != receipt.identity or checkpoint.weights != receipt.weights:
    raise RequestError(
      f'the receipt was made with other weights: {receipt.weights}, with SHA-256 '
      f'{receipt.identity.sha256[:12]} of their {receipt.identity.covers}; those of '
      f'{checkpoint.path} are {checkpoint.weights}, with SHA-256 {found.sha256[:12]} of their '
      f'{found.covers}: give the checkpoint that the server had'
    )


def _adapter(receipt: Receipt, checkpoint: Checkpoint, options: InferOptions) -> dict[str, Adapter]:
  """Return the receipt's adapter by the name that it has here; {} if the receipt has none.

  Raises:
    RequestError: The options have no adapter with its values.
  """
  if receipt.request.adapter is None:
    return {}
  adapters = read_adapters(options.adapter_paths, checkpoint)
  for name, adapter in adapters.items():
    if adapter.crc32 == receipt.adapter_crc32:
      return {name: adapter}
  name = printable(receipt.request.adapter, 80)
  raise RequestError(
    f'the receipt was made with the adapter {name}, of CRC-32 {receipt.adapter_crc32}, which no '
    f'loaded adapter has: give it by --adapters={name}=DIR'
  )


def _check_request(request: Request, vocab_size: int) -> None:
  check_tokens('the receipt', request.tokens, vocab_size)
  ends = request.end_ids or ()
  check_tokens('the receipt', ends, vocab_size)
  slot_row(request.sampling, vocab_size, seed=0, limit=request.limit, end_ids=ends)


def _run(
  engine: Engine, request: Request, vocabulary: Vocabulary | None, slots: int
) -> list[Sample]:
  names = engine.adapters
  config = config_for(engine.model, [names.prompted(request)], slots=slots, share=False)
  scheduler = Scheduler(engine.model, engine.weights, config, vocabulary=vocabulary, adapters=names)
  collector = SampleCollector()
  collector.expect(0, len(request.seeds))
  ended = [collector.add(event) for event in serve(scheduler, [request])]
  (samples,) = [each for each in ended if each is not None]
  return samples


def _different_settings(receipt: Receipt, engine: Engine) -> list[str]:
  """Return a line on settings and versions that differ from the receipt's; [] if none does."""
  grammars = receipt.request.grammar is not None
  now = {**dataclasses.asdict(EngineSetting.of(engine)), **versions(grammars=grammars)}
  then = {**dataclasses.asdict(receipt.setting), **receipt.versions}
  changed = [f'{name} {then[name]}, now {now[name]}' for name in now if now[name] != then[name]]
  exact = all(each['dtype'] == each['cache'] == 'float32' for each in (now, then))
  doubt = '' if exact else '; only float32 gives equal tokens whatever changes'
  return [f'the receipt was made with {"; ".join(changed)}{doubt}'] if changed else []


def _compare(sample: Sample, tokens: list[int], finish: str) -> str:
  """Return a text on how a sample differs from the receipt's; '' if it does not."""
  pairs = itertools.zip_longest(tokens, sample.tokens, fillvalue='none')
  for i, (then, now) in enumerate(pairs):
    if then != now:
      return f'token {i} differs: {then} in the receipt, {now} now'
  if sample.finish_reason != finish:
    return (
      f'the tokens are equal, but not the finish reason: {finish} in the receipt, '
      f'{sample.finish_reason} now'
    )
  return ''
