"""A T5X partitioner over the mesh axes x, y and z, with the shardings of the package's layouts."""

from collections.abc import Callable, Sequence
import hashlib
import itertools
import os
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from t5x import partitioning

from t5x_inference_ext.engine import saved_program
from t5x_inference_ext.errors import MeshError, RequestError
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.axis_rules import Rules, activation_rules, logical_axis_rules
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import AXES, make_mesh, mesh_text, parse_mesh
from t5x_inference_ext.t5x.refill import HostStep

# T5X's exporter and precompiler ask for an axis of this name. Its size is 1: a batch is not split
# before the model sees it, so any batch size will do; the model's own layout splits it.
DATA_AXIS = 'data'

# The function that t5x.utils.get_infer_fn makes of a model's step.
_INFER_STEP = 'infer_step_with_indices'


def inference_mesh(shape: Sequence[int] | Mesh) -> Mesh:
  """Return the mesh with axes data (of size 1), x, y and z.

  Args:
    shape: (X, Y, Z), over the first X*Y*Z devices; or a mesh of axes x, y, z, over its devices.

  Raises:
    MeshError: Fewer devices than that.
  """
  mesh = shape if isinstance(shape, Mesh) else make_mesh(shape)
  return Mesh(mesh.devices[None], (DATA_AXIS, *AXES))


def partitioner_rules(layout: Layout) -> Rules:
  """Return a layout's axis rules, with T5X's rule that splits batches in front."""
  return (('batch', DATA_AXIS), *logical_axis_rules(layout))


class InferencePartitioner(partitioning.PjitPartitioner):
  """Runs T5X's functions on an inference_mesh, with the rules of a layout (sharding.axis_rules).

  T5X takes from the rules how weights lie: to restore them, to partition functions of them and to
  write model-info.txt. Both phases share one set of weights, and so these rules. The rules of one
  phase's activations (phase_rules) are in force nowhere: prefill, decode steps and scores run per
  shard, with the activation sharding that those rules are read off. So does the KV cache between
  them, whose sharding T5X leaves open. Nor are weights declared anew in a phase. T5X's modules do
  so, and under rules without the weights' names that gathers all weights.

  Args:
    model: An InferenceModel, whose mesh and layout the partitioner takes.
    mesh: 'XxYxZ', where there is no model yet.
    layout: 'feedforward/attention' of either phase, beside `mesh`.
    executable: A file of saved_step.save_infer_step, which runs t5x.infer's step instead of
      compiling it. Loading it runs code: load files of your own making alone.

  Raises:
    MeshError: Neither model nor mesh or both, or more devices than there are.
    RequestError: An executable for a model with `refill`.
    SavedError: The executable can't be read.
  """

  def __init__(
    self,
    model: Any = None,
    mesh: str | None = None,
    layout: str = 'ws_2d/batch',
    executable: str | os.PathLike | None = None,
  ) -> None:
    if (model is None) == (mesh is None):
      raise MeshError('InferencePartitioner takes either a model, to share its mesh, or a mesh')
    if mesh is None:
      self._inference_mesh, weight_layout = model.model.mesh, model.model.prefill_layout
    else:
      self._inference_mesh, weight_layout = inference_mesh(parse_mesh(mesh)), Layout.parse(layout)
    self._host_driven = model is not None and model.refills
    if self._host_driven and executable is not None:
      raise RequestError(
        'InferencePartitioner.executable holds a compiled step, and a model with refill has none: '
        'use one of the two'
      )
    self._executable = executable
    if executable is not None:
      # A wrong path is found out now, not after the weights are restored.
      saved_program.read_program_header(executable)
    super().__init__(
      num_partitions=self._inference_mesh.size, logical_axis_rules=partitioner_rules(weight_layout)
    )

  def phase_rules(self, sharding: ActivationSharding) -> Rules:
    """Return the rules of a phase's activations, in front of the partitioner's own.

    For code beside the model, such as a decode_fn that constrains the cache with flax's
    with_logical_constraint.

    Args:
      sharding: Model.prefill_sharding's or Model.decode_sharding's.
    """
    return (*activation_rules(sharding), *self.logical_axis_rules)

  @property
  def mesh(self) -> Mesh:
    """The mesh with axes data, x, y and z."""
    return self._inference_mesh

  def partition(
    self,
    fn: Callable,
    in_axis_resources: Any,
    out_axis_resources: Any,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
  ) -> 'jax.stages.Wrapped | SavedStep | HostStep':
    """Return a function that runs `fn` over the mesh.

    The step of a model with `refill` is not compiled, but runs on the host. Nothing is put in force
    around the function: shardings and the model's own mesh are concrete.

    Args:
      fn: The function.
      in_axis_resources: Pytree prefix of PartitionSpecs of its arguments; None means replicated.
      out_axis_resources: PartitionSpecs of its results, likewise.
      static_argnums: See jax.jit for this and the next.
      donate_argnums: Arguments whose memory the results may take.
    """
    if self._host_driven and fn.__name__ == _INFER_STEP:
      return HostStep(fn, self.mesh)

    def shardings(specs: Any) -> Any:
      return jax.tree.map(
        lambda spec: NamedSharding(self.mesh, P() if spec is None else spec),
        specs,
        is_leaf=lambda x: x is None or isinstance(x, P),
      )

    step = jax.jit(
      fn,
      in_shardings=shardings(in_axis_resources),
      out_shardings=shardings(out_axis_resources),
      static_argnums=static_argnums,
      donate_argnums=donate_argnums,
    )
    if self._executable is None or fn.__name__ != _INFER_STEP:
      return step
    return SavedStep(self._executable, step, self.mesh)

  def get_local_chunk_info(
    self, global_shape: tuple[int, ...], mesh_axes: Sequence[str | Sequence[str] | None]
  ) -> partitioning.LocalChunkInfo:
    """Return the slice of an array that this process holds.

    T5X's own version takes no tuples of mesh axes.

    Args:
      global_shape: Shape of the whole array.
      mesh_axes: For each axis of the array, the mesh axes that split it.

    Raises:
      MeshError: The process holds several slices that do not touch.
    """
    chunker = self._local_chunker
    slices = []
    used: set[str] = set()
    for size, axes in itertools.zip_longest(global_shape, mesh_axes):
      axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
      used.update(axes)
      chunk, chunks = 0, 1
      whole = True  # no earlier axis is split within the process
      for axis in axes:
        if chunker.num_chunks[axis] > 1 and not whole:
          raise MeshError(
            f'on the mesh {mesh_text(self.mesh)} a process does not hold one contiguous slice of '
            f'an array split over {axes}: let the first of these axes cross processes'
          )
        whole &= self.mesh.local_mesh.shape[axis] == 1
        chunk = chunk * chunker.num_chunks[axis] + chunker.chunk_ids[axis]
        chunks *= chunker.num_chunks[axis]
      length = size // chunks
      slices.append(slice(chunk * length, (chunk + 1) * length) if axes else slice(None))
    return partitioning.LocalChunkInfo(tuple(slices), chunker.get_replica_id(used))


class SavedStep:
  """A partitioned step that is loaded from a file when it is first called.

  Args:
    path: The file.
    step: The step that would be compiled without the file.
    mesh: Mesh of its devices.
  """

  def __init__(self, path: str | os.PathLike, step: jax.stages.Wrapped, mesh: Mesh) -> None:
    self.path, self.step, self.mesh = path, step, mesh
    self._loaded: Callable[..., Any] | None = None

  def __call__(self, *arguments: Any) -> Any:
    """Run the step.

    Raises:
      SavedError: The file holds another program than this step with these arguments.
    """
    if self._loaded is None:
      shapes = saved_program.shapes(arguments)
      described = describe_step(self.step.lower(*shapes))
      self._loaded = saved_program.load(self.path, self.step, shapes, self.mesh, described)
    return self._loaded(*arguments)


def describe_step(lowered: jax.stages.Lowered) -> dict[str, str]:
  """Return what identifies a step: a digest of the program before compilation.

  Model, layouts, mode and decode_fn all change the program.
  """
  return {
    'phase': 't5x_infer_step',
    'program': hashlib.sha256(lowered.as_text().encode()).hexdigest(),
  }
