"""From the options of a run to an engine, saying on the way what was found, assumed and chosen."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax

from t5x_inference_ext import distributed
from t5x_inference_ext.checkpoints import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.load import scans_layers
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine import saved_generation
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.sampling import SamplingParams, stack_params
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.vocabularies import stop_sequences
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model, check_cache, check_dtype
from t5x_inference_ext.runs.clock import Clock
from t5x_inference_ext.runs.progress import print_on_main
from t5x_inference_ext.sharding.explain import ExplainSetting
from t5x_inference_ext.sharding.explain_text import explain
from t5x_inference_ext.sharding.layout import Layout, check_model, check_pair
from t5x_inference_ext.sharding.mesh import AXES, make_mesh, mesh_text, parse_mesh
from t5x_inference_ext.sharding.mesh_choice import choose_mesh

BATCHING = ('continuous', 'static')
MODES = ('predict', 'predict_with_aux', 'score')


@dataclasses.dataclass(frozen=True)
class InferOptions:
  """What every run is told, from flags or from gin.

  Attributes:
    checkpoint: directory.
    mode: one of MODES.
    mesh: 'XxYxZ', or None for default_mesh.
    dtype: of activations and float weights.
    cache: what the KV cache holds: 'float32', 'bfloat16', 'int8', or None: dtype.
    prefill_layout, decode_layout: 'feedforward/attention', for each phase; see sharding.layout.Layout.
    norm_scale: 'zero', 'one' or None: what the checkpoint says.
    config: the model that the checkpoint must hold, or None: the one it holds.
    batch_size: rows a batch, rounded up to what the mesh takes.
    max_new_tokens: the limit for each row.
    max_length: of prompt and new tokens together, or None: no such limit.
    cache_length: positions of each row's cache, or None: as many as needed.
    sampler: how tokens are chosen.
    stop: texts that end a row, beside the sampler's sequences of ids: see with_vocabulary.
    num_decodes: samples of each prompt.
    seed: of the run; each row has its own from it.
    scan_layers: as Engine.load's.
    executable: a saved generation (precompile --phase=generate --save) to run instead of compiling, or None.
    batching: 'continuous', prompts enter slots as rows leave them, or 'static', batches that end as a whole.
    prefill_chunk: positions of a prompt that one pass takes, with continuous batching.
    prefill_budget: prompt tokens between decode steps, at most, while rows wait.
    token_log_probs: with a prompts file, whether each token's log-probability is told.
    top_log_probs: of a prompts file that is continued, how many of the most likely tokens are told at each step.

  Raises:
    RequestError: a value out of its range.
    MeshError: layouts that are not known, or can't share weights.
  """

  checkpoint: str
  mode: str = 'predict'
  mesh: str | None = None
  dtype: str = 'bfloat16'
  cache: str | None = None
  prefill_layout: str = 'ws_2d/batch'
  decode_layout: str = 'ws_2d/batch'
  norm_scale: str | None = None
  config: ModelConfig | None = None
  batch_size: int = 32
  max_new_tokens: int = 64
  max_length: int | None = None
  cache_length: int | None = None
  sampling: SamplingParams = SamplingParams()
  stop: tuple[str, ...] = ()
  num_decodes: int = 1
  seed: int = 0
  scan_layers: bool | None = None
  executable: str | None = None
  batching: str = 'continuous'
  prefill_chunk: int = 256
  prefill_budget: int = 2048
  token_log_probs: bool = False
  top_log_probs: int = 0

  def __post_init__(self):
    if self.mode not in MODES:
      raise RequestError(f'mode must be one of {", ".join(MODES)}, got {self.mode!r}')
    if self.batching not in BATCHING:
      raise RequestError(f'batching must be one of {", ".join(BATCHING)}, got {self.batching!r}')
    check_dtype(self.dtype)
    check_cache(self.cache)
    check_pair(*self.layouts)
    for name, least in (
      ('batch_size', 1),
      ('max_new_tokens', 1),
      ('seed', 0),
      ('prefill_chunk', 1),
      ('prefill_budget', 1),
      ('num_decodes', 1),
      ('top_log_probs', 0),
    ):
      value = getattr(self, name)
      if not isinstance(value, int) or value < least:
        raise RequestError(f'{name} must be a whole number, {least} or more, got {value!r}')
    if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
      raise RequestError(
        f'stop must be texts that are not empty, got {self.stop!r}; Sampler.stop takes ids'
      )
    object.__setattr__(self, 'stop', tuple(self.stop))
    self._check_asked()
    if self.executable is not None and self.mode == 'score':
      raise RequestError(f"the executable {self.executable} generates: mode=score can't use it")
    # An empty prompt needs max_new_tokens positions: BOS takes one and the last new token none.
    if (
      self.mode != 'score'
      and self.cache_length is not None
      and self.cache_length < self.max_new_tokens
    ):
      raise RequestError(
        f'cache_length={self.cache_length} has no room for max_new_tokens={self.max_new_tokens}: '
        'raise the one or lower the other'
      )

  def _check_asked(self) -> None:
    """Raises RequestError for what the mode, or the way that rows are batched, has not."""
    asked = {
      'num_decodes': self.num_decodes > 1,
      'top_log_probs': self.top_log_probs,
      'token_log_probs': self.token_log_probs,
    }
    if self.mode == 'score':
      asked = {
        **asked,
        'token_log_probs': False,
        'stop': self.stop or self.sampling.stop,
        'logit_bias': self.sampling.logit_bias,
      }
      why = 'is for runs that generate: mode=score chooses no tokens'
    elif self.executable is not None:
      why = f"can't be used with the executable {self.executable}: it returns one sample of each row, and its score"
    else:
      why = 'needs batching=continuous: a static batch has one sample of each row, and tells its score alone'
    wrong = [name for name, value in asked.items() if value]
    if wrong and not (self.mode != 'score' and self.continuous):
      raise RequestError(f'{wrong[0]} {why}')

  @property
  def layouts(self) -> tuple[Layout, Layout]:
    """Of prefill and of decode."""
    return Layout.parse(self.prefill_layout), Layout.parse(self.decode_layout)

  @property
  def continuous(self) -> bool:
    """Whether slots are refilled. A saved generation is a whole batch's."""
    return self.batching == 'continuous' and self.executable is None

  @property
  def max_prompt(self) -> int | None:
    """The longest prompt that the cache has room for, or None: any."""
    return None if self.cache_length is None else self.cache_length - self.max_new_tokens


def with_vocabulary(options: InferOptions, vocabulary: Any, vocab_size: int) -> InferOptions:
  """The options with the texts that end rows among the sampler's stop sequences.

  Args:
    options: of the run.
    vocabulary: encodes and decodes; not needed without texts.
    vocab_size: V, rows of the model's embedding.

  Raises:
    RequestError: a text that the vocabulary can't write, or ids that the model does not have.
  """
  if options.top_log_probs > vocab_size:
    raise RequestError(
      f'top_log_probs={options.top_log_probs} are more tokens than the {vocab_size} of the model'
    )
  ids = [sequence for text in options.stop for sequence in stop_sequences(vocabulary, text)]
  sampling = dataclasses.replace(options.sampling, stop=(*options.sampling.stop, *ids))
  stack_params([sampling], vocab_size)
  return dataclasses.replace(options, sampling=sampling)


def open_model(
  options: InferOptions, say: Callable[[str], None] = print_on_main
) -> tuple[Checkpoint, jax.sharding.Mesh]:
  """Opens the checkpoint and makes the mesh; weights are not read yet.

  Raises:
    CheckpointError, MeshError: no such checkpoint, or a mesh that does not fit the devices or the model.
  """
  # A mesh too big for the devices needs no checkpoint to be found out.
  mesh = None if options.mesh is None else make_mesh(parse_mesh(options.mesh))
  checkpoint = open_checkpoint(
    options.checkpoint, norm_scale=options.norm_scale, config=options.config
  )
  for note in checkpoint.notes:
    say(note)
  source = 'given'
  if mesh is None:
    mesh, source = (
      make_mesh(choose_mesh(checkpoint.config, jax.devices())),
      'all that divide the model',
    )
  distributed.check_mesh(mesh)
  check_model(checkpoint.config, mesh.shape)
  processes = f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''
  say(
    f'mesh: {mesh_text(mesh)} ({source}), {mesh.size} of {len(jax.devices())} {jax.devices()[0].platform} devices'
    f'{processes}'
  )
  return checkpoint, mesh


def explain_layout(
  options: InferOptions, prompt_length: int, say: Callable[[str], None] = print_on_main
) -> None:
  """Says where every tensor of such a run would live. The mesh may be larger than the devices that there are.

  Args:
    options: of the run.
    prompt_length: tokens of its prompts, BOS not counted.

  Raises:
    CheckpointError, MeshError: as open_model.
  """
  checkpoint = open_checkpoint(
    options.checkpoint, norm_scale=options.norm_scale, config=options.config
  )
  config = checkpoint.config
  sizes = choose_mesh(config, jax.devices()) if options.mesh is None else parse_mesh(options.mesh)
  prefill, decode = options.layouts
  new_tokens = (
    options.max_new_tokens if options.max_length is None else options.max_length - prompt_length
  )
  setting = ExplainSetting(
    config,
    dict(zip(AXES, sizes)),
    prefill,
    decode,
    dtype=options.dtype,
    cache=options.cache,
    int8=checkpoint.weights == 'int8',
    stacked=scans_layers(config.num_layers, options.scan_layers, jax.devices()[0].platform),
    batch=options.batch_size,
    prompt_length=prompt_length + 1,
    cache_length=options.cache_length or prompt_length + new_tokens,
  )
  here = math.prod(sizes) <= len(jax.devices())
  say(explain(setting, make_mesh(sizes) if here else None))


def load_engine(
  options: InferOptions,
  checkpoint: Checkpoint,
  mesh: jax.sharding.Mesh,
  progress=iter,
  say: Callable[[str], None] = print_on_main,
) -> Engine:
  """Loads the weights.

  Raises:
    SavedError: options.executable is not what these options need; before the weights are read.
  """
  with distributed.together():
    if options.executable is not None:
      saved_generation.check_options(
        options.executable,
        max_new_tokens=options.max_new_tokens,
        max_length=options.max_length,
        sampling=dataclasses.asdict(options.sampling),
      )
    engine = Engine.load(
      checkpoint,
      mesh=mesh,
      dtype=options.dtype,
      cache=options.cache,
      prefill_layout=options.prefill_layout,
      decode_layout=options.decode_layout,
      scan_layers=options.scan_layers,
      executable=options.executable,
      progress=progress,
    )
  model = engine.model
  say(
    f'layouts: prefill {model.prefill_layout}, decode {model.decode_layout}, {options.dtype} activations, '
    f'{checkpoint.weights} weights, {model.cache_dtype} cache'
  )
  return engine


def batch_rows(
  options: InferOptions,
  engine: Engine,
  rows: int | None,
  say: Callable[[str], None] = print_on_main,
) -> int:
  """The rows of each batch: options.batch_size, fewer for fewer rows, rounded up to what the mesh takes."""
  if engine.executable:
    say(f'batch: {engine.executable.run.batch} rows, as {options.executable} was compiled')
    return engine.executable.run.batch
  asked = options.batch_size if rows is None else min(options.batch_size, rows)
  batch = engine.padded_batch(asked)
  note = ''
  if batch > options.batch_size:
    note = f' ({options.batch_size} does not divide over the mesh {mesh_text(engine.model.mesh)}; rounded up)'
  say(f'batch: {batch} rows{note}')
  return batch


def say_slots(
  options: InferOptions,
  config: SchedulerConfig,
  shared: tuple[int, ...],
  model: Model,
  say: Callable[[str], None] = print_on_main,
) -> None:
  """The same for slots that are refilled, and what prompts share."""
  note = ''
  if config.slots > options.batch_size:
    note = (
      f' ({options.batch_size} does not divide over the mesh {mesh_text(model.mesh)}; rounded up)'
    )
  say(f'batch: {config.slots} rows{note}, refilled as they end')
  if shared:
    say(f'shared: {len(shared)} first positions of the prompts are prefilled and stored once')


def description(options: InferOptions, engine: Engine) -> dict[str, Any]:
  """What was resolved, JSON-ready, to be kept beside the results."""
  checkpoint = engine.checkpoint
  return {
    'checkpoint': {
      'path': checkpoint.path,
      'format': checkpoint.format,
      'step': checkpoint.step,
      'weights': checkpoint.weights,
      'notes': list(checkpoint.notes),
    },
    'model': checkpoint.config.to_dict(),
    'mode': options.mode,
    'mesh': mesh_text(engine.model.mesh),
    'prefill_layout': str(engine.model.prefill_layout),
    'decode_layout': str(engine.model.decode_layout),
    'dtype': options.dtype,
    'cache': engine.model.cache_dtype,
    'sampling': {**dataclasses.asdict(options.sampling), 'seed': options.seed},
    'max_new_tokens': options.max_new_tokens,
    'max_length': options.max_length,
    'num_decodes': options.num_decodes,
    'batching': 'continuous' if options.continuous else 'static',
    'jax': jax.__version__,
    'devices': jax.devices()[0].device_kind,
    'processes': jax.process_count(),
  }


def run_summary(clock: Clock, mode: str) -> str:
  """What was done, and how fast: useful tokens alone, compilation apart."""
  verb = 'scored' if mode == 'score' else 'generated'
  return (
    f'{clock.rows} rows, {clock.tokens} tokens {verb} in {clock.seconds:.2f} s: {clock.tokens_per_second:.0f} '
    f'tokens/s; compilation took {clock.compile_seconds:.2f} s besides'
  )
