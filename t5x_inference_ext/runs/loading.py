"""From the options of a run to an engine, saying on the way what was found, assumed and chosen."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

import jax

from t5x_inference_ext import distributed
from t5x_inference_ext.checkpoints import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.load import scans_layers
from t5x_inference_ext.engine import saved_generation
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.runs.clock import Clock
from t5x_inference_ext.runs.infer_options import InferOptions
from t5x_inference_ext.runs.progress import print_on_main
from t5x_inference_ext.sharding.explain import ExplainSetting
from t5x_inference_ext.sharding.explain_text import explain
from t5x_inference_ext.sharding.layout import check_model
from t5x_inference_ext.sharding.mesh import AXES, make_mesh, mesh_text, parse_mesh
from t5x_inference_ext.sharding.mesh_choice import choose_mesh


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
      saved_generation.check_saved_run(
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
  batch = engine.model.padded_batch(asked)
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
