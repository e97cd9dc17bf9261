"""From the options of a run to an engine, saying on the way what was found, assumed and chosen."""

import dataclasses
from typing import Any, Callable

import jax

from t5x_inference_ext.checkpoints import Checkpoint, open_checkpoint
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.decoding.model import check_dtype
from t5x_inference_ext.decoding.sampling import Sampler
from t5x_inference_ext.engine import Engine
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.layouts.layout import check_model, default_mesh
from t5x_inference_ext.layouts.mesh import make_mesh, mesh_text, parse_mesh
from t5x_inference_ext.serving.batches import Clock

MODES = ('predict', 'predict_with_aux', 'score')


@dataclasses.dataclass(frozen=True)
class Options:
  """What every run is told, from flags or from gin.

  Attributes:
    checkpoint: directory.
    mode: one of MODES.
    mesh: 'XxYxZ', or None for default_mesh.
    dtype: of activations, cache and float weights.
    layout: 'feedforward/attention'.
    norm_scale: 'zero', 'one' or None: what the checkpoint says.
    config: the model that the checkpoint must hold, or None: the one it holds.
    batch_size: rows a batch, rounded up to what the mesh takes.
    max_new_tokens: the limit for each row.
    max_length: of prompt and new tokens together, or None: no such limit.
    cache_length: positions of each row's cache, or None: as many as needed.
    sampler: how tokens are chosen.
    seed: of the run; each row has its own from it.

  Raises:
    RequestError: a value out of its range.
  """

  checkpoint: str
  mode: str = 'predict'
  mesh: str | None = None
  dtype: str = 'bfloat16'
  layout: str = 'ws_2d/batch'
  norm_scale: str | None = None
  config: ModelConfig | None = None
  batch_size: int = 32
  max_new_tokens: int = 64
  max_length: int | None = None
  cache_length: int | None = None
  sampler: Sampler = Sampler()
  seed: int = 0

  def __post_init__(self):
    if self.mode not in MODES:
      raise RequestError(f'mode must be one of {", ".join(MODES)}, got {self.mode!r}')
    check_dtype(self.dtype)
    for name, least in (('batch_size', 1), ('max_new_tokens', 1), ('seed', 0)):
      value = getattr(self, name)
      if not isinstance(value, int) or value < least:
        raise RequestError(f'{name} must be a whole number, {least} or more, got {value!r}')
    # An empty prompt needs max_new_tokens positions: BOS takes one and the last new token none.
    if self.mode != 'score' and self.cache_length is not None and self.cache_length < self.max_new_tokens:
      raise RequestError(f'cache_length={self.cache_length} has no room for max_new_tokens={self.max_new_tokens}: '
                         'raise the one or lower the other')

  @property
  def max_prompt(self) -> int | None:
    """The longest prompt that the cache has room for, or None: any."""
    return None if self.cache_length is None else self.cache_length - self.max_new_tokens


def open_model(options: Options, say: Callable[[str], None] = print) -> tuple[Checkpoint, jax.sharding.Mesh]:
  """Opens the checkpoint and makes the mesh; weights are not read yet.

  Raises:
    CheckpointError, MeshError: no such checkpoint, or a mesh that does not fit the devices or the model.
  """
  # A mesh too big for the devices needs no checkpoint to be found out.
  mesh = None if options.mesh is None else make_mesh(parse_mesh(options.mesh))
  checkpoint = open_checkpoint(options.checkpoint, norm_scale=options.norm_scale, config=options.config)
  for note in checkpoint.notes:
    say(note)
  source = 'given'
  if mesh is None:
    mesh, source = make_mesh(default_mesh(checkpoint.config, len(jax.devices()))), 'all that divide the model'
  check_model(checkpoint.config, mesh.shape)
  say(f'mesh: {mesh_text(mesh)} ({source}), {mesh.size} of {len(jax.devices())} {jax.devices()[0].platform} devices')
  return checkpoint, mesh


def load_engine(options: Options, checkpoint: Checkpoint, mesh: jax.sharding.Mesh, progress=iter,
                say: Callable[[str], None] = print) -> Engine:
  """Loads the weights."""
  engine = Engine.load(checkpoint, mesh=mesh, dtype=options.dtype, layout=options.layout, progress=progress)
  say(f'layout: {engine.model.layout}, {options.dtype} activations, {checkpoint.weights} weights')
  return engine


def batch_rows(options: Options, engine: Engine, rows: int | None, say: Callable[[str], None] = print) -> int:
  """The rows of each batch: options.batch_size, fewer for fewer rows, rounded up to what the mesh takes."""
  asked = options.batch_size if rows is None else min(options.batch_size, rows)
  batch = engine.padded_batch(asked)
  note = ''
  if batch > options.batch_size:
    note = f' ({options.batch_size} does not divide over the mesh {mesh_text(engine.model.mesh)}; rounded up)'
  say(f'batch: {batch} rows{note}')
  return batch


def description(options: Options, engine: Engine) -> dict[str, Any]:
  """What was resolved, JSON-ready, to be kept beside the results."""
  checkpoint = engine.checkpoint
  return {
      'checkpoint': {'path': checkpoint.path, 'format': checkpoint.format, 'step': checkpoint.step,
                     'weights': checkpoint.weights, 'notes': list(checkpoint.notes)},
      'model': checkpoint.config.to_dict(),
      'mode': options.mode,
      'mesh': mesh_text(engine.model.mesh),
      'layout': str(engine.model.layout),
      'dtype': options.dtype,
      'sampling': {**dataclasses.asdict(options.sampler), 'seed': options.seed},
      'max_new_tokens': options.max_new_tokens,
      'max_length': options.max_length,
      'jax': jax.__version__,
      'devices': jax.devices()[0].device_kind,
  }


def summary(clock: Clock, mode: str) -> str:
  """What was done, and how fast: useful tokens alone, compilation apart."""
  verb = 'scored' if mode == 'score' else 'generated'
  return (f'{clock.rows} rows, {clock.tokens} tokens {verb} in {clock.seconds:.2f} s: {clock.tokens_per_second:.0f} '
          f'tokens/s; compilation took {clock.compile_seconds:.2f} s besides')
