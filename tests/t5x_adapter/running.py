"""T5X's inference loop in this process, with the stock model and with the adapter's."""

import asyncio
import contextlib
import functools
import json
import pathlib
from unittest import mock

import seqio
from t5x import checkpoints, decoding, infer, models, optimizers, partitioning, utils

from t5x_inference_ext.t5x.checkpoints import InferenceCheckpointer, InferenceCheckpointManager
from t5x_inference_ext.t5x.models import InferenceModel
from t5x_inference_ext.t5x.partitioning import InferencePartitioner
from tests.t5x_adapter import inference_tasks, palm_flaxformer

GREEDY = functools.partial(decoding.temperature_sample, temperature=0.0)
VOCABULARY = seqio.ByteVocabulary()


@contextlib.contextmanager
def closed_event_loops():
  """Close the event loop that T5X's Checkpointer leaves open: a ResourceWarning, later."""
  loops, new_event_loop = [], asyncio.new_event_loop

  def recorded():
    loops.append(new_event_loop())
    return loops[-1]

  with mock.patch.object(asyncio, 'new_event_loop', recorded):
    yield
  for loop in loops:
    loop.close()


def stock_model(decode_fn=GREEDY) -> models.DecoderOnlyModel:
  """palm_tiny as flaxformer builds it."""
  return models.DecoderOnlyModel(
    palm_flaxformer.make_module(384, 4, 256, 1024, 8, 32),
    VOCABULARY,
    optimizer_def=None,
    decode_fn=decode_fn,
  )


def adapter_model(
  checkpoint, mesh='1x1x1', decode_fn=GREEDY, dtype='float32', **kwargs
) -> InferenceModel:
  return InferenceModel(
    VOCABULARY, str(checkpoint), mesh=mesh, decode_fn=decode_fn, dtype=dtype, **kwargs
  )


def infer_rows(
  model, partitioner, restore_cfg, output_dir: pathlib.Path, mode, checkpoint_period=100, **kwargs
) -> list[dict]:
  infer.infer(
    mode=mode,
    model=model,
    partitioner=partitioner,
    restore_checkpoint_cfg=restore_cfg,
    output_dir=str(output_dir),
    dataset_cfg=utils.DatasetConfig(
      inference_tasks.TASK,
      inference_tasks.LENGTHS,
      split='test',
      batch_size=3,
      shuffle=False,
      seed=0,
    ),
    checkpoint_period=checkpoint_period,
    **kwargs,
  )
  written = output_dir / f'{inference_tasks.TASK}-{mode}.jsonl-00000-of-00001'
  return [json.loads(line) for line in written.read_text(encoding='utf-8').splitlines()]


def stock_infer(checkpoint, output_dir: pathlib.Path, mode: str) -> list[dict]:
  """The rows that T5X writes with flaxformer's model, from a legacy checkpoint."""
  with closed_event_loops():
    return infer_rows(
      stock_model(),
      partitioning.PjitPartitioner(num_partitions=1),
      utils.RestoreCheckpointConfig(str(checkpoint), 'specific', dtype='float32'),
      output_dir,
      mode,
    )


def adapter_infer(
  checkpoint,
  output_dir: pathlib.Path,
  mode: str,
  mesh: str,
  restore_dtype=None,
  layouts: tuple[str, str] = ('ws_2d/batch', 'ws_2d/batch'),
  **kwargs,
) -> list[dict]:
  """The rows that T5X writes with the adapter's model on `mesh`."""
  model = adapter_model(checkpoint, mesh, prefill_layout=layouts[0], decode_layout=layouts[1])
  return infer_with(
    model, InferencePartitioner(model), checkpoint, output_dir, mode, restore_dtype, **kwargs
  )


def infer_with(
  model: InferenceModel,
  partitioner: InferencePartitioner,
  checkpoint,
  output_dir: pathlib.Path,
  mode: str,
  restore_dtype=None,
  **kwargs,
) -> list[dict]:
  """The rows that T5X writes with this model and partitioner."""
  restore_cfg = utils.RestoreCheckpointConfig(
    str(checkpoint),
    'specific',
    dtype=restore_dtype,
    checkpoint_manager_cls=functools.partial(InferenceCheckpointManager, model=model),
    checkpointer_cls=functools.partial(InferenceCheckpointer, model=model),
  )
  return infer_rows(model, partitioner, restore_cfg, output_dir, mode, **kwargs)


def restored(model: InferenceModel, checkpoint, restore_dtype=None):
  """A model's state as t5x.infer restores it, with the initializer and partitioner that did it."""
  partitioner = InferencePartitioner(model)
  initializer = utils.TrainStateInitializer(
    None, model.get_initial_variables, {'decoder_input_tokens': (3, 96)}, partitioner
  )
  restore_cfg = utils.RestoreCheckpointConfig(
    str(checkpoint),
    'specific',
    dtype=restore_dtype,
    strict=False,
    checkpoint_manager_cls=functools.partial(InferenceCheckpointManager, model=model),
  )
  state, _ = utils.create_checkpoint_manager_and_restore(
    initializer, partitioner, restore_cfg, str(checkpoint), None, use_orbax=True
  )
  return state, initializer, partitioner


def saved_by_t5x(state, partitioner, directory: pathlib.Path) -> None:
  """Writes a state with T5X's own legacy Checkpointer, its leaves as they are."""
  with closed_event_loops():
    checkpoints.Checkpointer(state, partitioner, str(directory), save_dtype=None).save(state)


def optimizer_state(model, partitioner):
  """A train state of shapes that has an optimizer, as training scripts ask for."""
  return utils.TrainStateInitializer(
    optimizers.adamw(0.1),
    model.get_initial_variables,
    {'decoder_input_tokens': (3, 32)},
    partitioner,
  ).global_train_state_shape
