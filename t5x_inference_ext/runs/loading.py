"""Prepare an engine from a run's options, and print what is found, assumed and chosen."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any, NamedTuple

import jax

from t5x_inference_ext import distributed
from t5x_inference_ext.checkpoints import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.adapters.adapter import Adapter
from t5x_inference_ext.checkpoints.load import scans_layers
from t5x_inference_ext.engine import saved_generation
from t5x_inference_ext.engine.draft_model import open_draft_model
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.runs.clock import Clock
from t5x_inference_ext.runs.infer_options import InferOptions
from t5x_inference_ext.runs.progress import print_on_main, progress
from t5x_inference_ext.sharding.explain import ExplainSetting
from t5x_inference_ext.sharding.explain_text import explain
from t5x_inference_ext.sharding.layout import check_model
from t5x_inference_ext.sharding.mesh import AXES, make_mesh, mesh_text, parse_mesh
from t5x_inference_ext.sharding.mesh_choice import choose_mesh
from t5x_inference_ext.speculation import parse_speculation


class OpenModel(NamedTuple):
  """A model whose weights are not read yet.

  Attributes:
    checkpoint: The checkpoint.
    mesh: The mesh.
    draft: Checkpoint of the draft model, or None.
  """

  checkpoint: Checkpoint
  mesh: jax.sharding.Mesh
  draft: Checkpoint | None


def open_model(options: InferOptions) -> OpenModel:
  """Open the checkpoints and make the mesh. Does not read weights yet.

  Raises:
    CheckpointError: There is no checkpoint, or it holds another model.
    MeshError: The mesh does not fit the devices or the model.
    RequestError: The draft model has another vocabulary.
  """
  # Check the mesh before reading the checkpoint: it may need more devices than there are.
  mesh = None if options.mesh is None else make_mesh(parse_mesh(options.mesh))
  if '://' in options.checkpoint:  # without credentials, retries take minutes
    print_on_main(f'opening {options.checkpoint}, with the credentials of this machine')
  checkpoint = open_checkpoint(options.checkpoint, config=options.config, **options.conventions)
  for note in checkpoint.notes:
    print_on_main(note)
  source = 'given'
  devices = jax.devices()
  if mesh is None:
    mesh, source = make_mesh(choose_mesh(checkpoint.config, devices)), 'all that divide the model'
  distributed.check_mesh(mesh)
  check_model(checkpoint.config, mesh.shape)
  draft = None
  if options.speculate is not None and (path := parse_speculation(options.speculate).path):
    draft = open_draft_model(path, checkpoint.config, mesh)
  processes = f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''
  print_on_main(
    f'mesh: {mesh_text(mesh)} ({source}), {mesh.size} of {len(devices)} {devices[0].platform} '
    f'devices{processes}'
  )
  return OpenModel(checkpoint, mesh, draft)


def explain_layout(options: InferOptions, prompt_length: int) -> None:
  """Print the sharding of every tensor of a run. The mesh may be larger than the machine.

  Args:
    options: Options of the run.
    prompt_length: Tokens of a prompt, BOS not counted.

  Raises:
    CheckpointError: There is no checkpoint, or it holds another model.
    MeshError: The mesh does not fit the model.
  """
  checkpoint = open_checkpoint(options.checkpoint, config=options.config, **options.conventions)
  config = checkpoint.config
  sizes = choose_mesh(config, jax.devices()) if options.mesh is None else parse_mesh(options.mesh)
  prefill, decode = options.layouts
  new_tokens = options.max_new_tokens
  if options.max_length is not None:
    new_tokens = options.max_length - prompt_length
  setting = ExplainSetting(
    config,
    dict(zip(AXES, sizes)),
    prefill,
    decode,
    dtype=options.dtype,
    cache=options.cache,
    weights=checkpoint.weights,
    stacked=scans_layers(config.num_layers, options.scan_layers, jax.devices()[0].platform),
    batch=options.batch_size,
    prompt_length=prompt_length + 1,
    cache_length=options.cache_length or prompt_length + new_tokens,
  )
  here = math.prod(sizes) <= len(jax.devices())
  print_on_main(explain(setting, make_mesh(sizes) if here else None))


def load_engine(
  options: InferOptions,
  checkpoint: Checkpoint,
  mesh: jax.sharding.Mesh,
  adapters: Mapping[str, Adapter] | None = None,
) -> Engine:
  """Load the weights onto the mesh, with a progress bar.

  Args:
    options: Options of the run.
    checkpoint: The model.
    mesh: The devices.
    adapters: The options' adapters, if they were read before; None: they are read here.

  Raises:
    SavedError: The saved program does not fit these options. Raised before weights are read.
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
      attention=options.attention,
      prefill_layout=options.prefill_layout,
      decode_layout=options.decode_layout,
      scan_layers=options.scan_layers,
      executable=options.executable,
      adapters=options.adapter_paths if adapters is None else adapters,
      progress=lambda jobs: progress(jobs, 'loading weights', len(jobs)),
    )
  model = engine.model
  if engine.adapters.prompts:
    print_on_main(f'adapters: {", ".join(engine.adapters.prompts)}')
  print_on_main(
    f'layouts: prefill {model.prefill_layout}, decode {model.decode_layout}, {options.dtype} '
    f'activations, {checkpoint.weights} weights, {model.cache_dtype} cache'
  )
  return engine


def say_compiling(engine: Engine) -> None:
  """Print that the first rows have to wait for compilation, unless the program is a saved one."""
  if engine.executable is None:
    print_on_main('compiling: the first rows come after this')


def batch_rows(
  options: InferOptions, engine: Engine, rows: int | None, *, shown: bool = True
) -> int:
  """Return the batch size: batch_size, or `rows` if fewer, rounded up for the mesh.

  Args:
    options: Options of the run.
    engine: The engine to run on.
    rows: Number of rows of the run; None if unknown, or if at least batch_size.
    shown: Whether to print the size.
  """
  if engine.executable:
    print_on_main(
      f'batch: {engine.executable.run.batch} rows, as {options.executable} was compiled'
    )
    return engine.executable.run.batch
  batch = engine.model.padded_batch(
    options.batch_size if rows is None else min(options.batch_size, rows)
  )
  if shown:
    print_on_main(f'batch: {batch} rows{rounded_note(options, batch, engine)}')
  return batch


def rounded_note(options: InferOptions, rows: int, engine: Engine) -> str:
  """Return a note if a batch was rounded up to more rows than requested, else ''."""
  if rows <= options.batch_size:
    return ''
  mesh = mesh_text(engine.model.mesh)
  return f' ({options.batch_size} does not divide over the mesh {mesh}; rounded up)'


def description(options: InferOptions, engine: Engine) -> dict[str, Any]:
  """Return the resolved settings of a run, JSON-ready, to keep beside its results."""
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
    'attention': engine.model.attention,
    'sampling': {**dataclasses.asdict(options.sampling), 'seed': options.seed},
    'max_new_tokens': options.max_new_tokens,
    'max_length': options.max_length,
    'num_decodes': options.num_decodes,
    **({} if options.speculate is None else {'speculate': options.speculate}),
    **({'adapters': options.adapter_paths, 'adapter': options.adapter} if options.adapters else {}),
    'batching': 'continuous' if options.continuous else 'static',
    'jax': jax.__version__,
    'devices': jax.devices()[0].device_kind,
    'processes': jax.process_count(),
  }


def run_summary(clock: Clock, mode: str) -> str:
  """Return a line with a run's rows, useful tokens, and speed without compilation."""
  verb = 'scored' if mode == 'score' else 'generated'
  drafts, note = clock.drafts, ''
  if drafts.row_steps:
    note = (
      f'; {drafts.tokens_per_step:.2f} tokens a step, {drafts.accepted} of {drafts.drafted} draft '
      'tokens accepted'
    )
  return (
    f'{clock.rows} rows, {clock.tokens} tokens {verb} in {clock.seconds:.2f} s: '
    f'{clock.tokens_per_second:.0f} tokens/s; compilation took {clock.compile_seconds:.2f} s '
    f'extra{note}'
  )
