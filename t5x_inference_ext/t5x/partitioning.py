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

from t5x_inference_ext.compiler_options import compiler_options, take_int4
from t5x_inference_ext.engine import saved_program
from t5x_inference_ext.errors import MeshError, RequestError
from t5x_inference_ext.quantization.formats import weight_format
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.axis_rules import Rules, activation_rules, logical_axis_rules
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import AXES, make_mesh, mesh_text, parse_mesh
from t5x_inference_ext.t5x.refill import HostStep

# Mesh axis that T5X's exporter and precompiler require. Its size is 1, so that T5X does not split
# batches, and any batch size is allowed. The model's layout splits batches later.
DATA_AXIS = 'data'

# Name of the function into which t5x.utils.get_infer_fn wraps a model's step.
_INFER_STEP = 'infer_step_with_indices'


def inference_mesh(shape: Sequence[int] | Mesh) -> Mesh:
  """Return the mesh with axes data (of size 1), x, y and z.

  Args:
    shape: (X, Y, Z), over the first X*Y*Z devices; or a mesh with axes x, y and z.

  Raises:
    MeshError: There are fewer devices than the mesh needs.
  """
  mesh = shape if isinstance(shape, Mesh) else make_mesh(shape)
  return Mesh(mesh.devices[None], (DATA_AXIS, *AXES))


def partitioner_rules(layout: Layout) -> Rules:
  """Return a layout's axis rules, with T5X's rule that splits batches in front."""
  return (('batch', DATA_AXIS), *logical_axis_rules(layout))


class InferencePartitioner(partitioning.PjitPartitioner):
  """Runs T5X's functions on an inference_mesh, with the rules of a layout (sharding.axis_rules).

  From the rules T5X derives the sharding of weights, to restore them, to partition functions of
  them, and to write model-info.txt. Both phases share the weights, and so the rules.

  These rules do not cover activations, because prefill, decode steps and scores run under shard_map
  with the layout's own sharding of activations and KV cache; `phase_rules` describes that sharding.
  (T5X's own modules declare weights inside each function, and gather all weights if the active
  rules lack the weights' axes. The phases here do not.)

  Args:
    model: An InferenceModel. The partitioner uses its mesh and layout.
    mesh: 'XxYxZ', if there is no model yet.
    layout: Layout of either phase, 'feedforward/attention'; only used with `mesh`.
    executable: Path of a file written by saved_step.save_infer_step. Its program replaces
      t5x.infer's step, which is then not compiled. Loading the file runs code from it, so load only
      files that you made.

  Raises:
    MeshError: Both model and mesh are given, or neither; or the mesh needs more devices than there
      are.
    RequestError: An executable is given for a model with `refill`.
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
    self._scaled = () if model is None else weight_format(model.module.weights).scaled
    self._host_driven = model is not None and model.refills
    if self._host_driven and executable is not None:
      raise RequestError(
        'InferencePartitioner.executable holds a compiled step, and a model with refill has none: '
        'use one of the two'
      )
    self._executable = executable
    if executable is not None:
      # Read the header now, so that a wrong path raises an error before the weights are restored.
      saved_program.read_program_header(executable)
    super().__init__(
      num_partitions=self._inference_mesh.size, logical_axis_rules=partitioner_rules(weight_layout)
    )

  def phase_rules(self, sharding: ActivationSharding) -> Rules:
    """Return the rules of a phase's activations, followed by the partitioner's own rules.

    The rules are for code outside of the model, such as a decode_fn that constrains the cache with
    flax's with_logical_constraint.

    Args:
      sharding: Result of Model.prefill_sharding or Model.decode_sharding.
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

    The step of a model with `refill` is not compiled, but runs on the host. It runs without a mesh
    context or axis rules, which it does not need, since all shardings name their mesh.

    Args:
      fn: The function.
      in_axis_resources: Pytree prefix of PartitionSpecs of its arguments; None means replicated.
      out_axis_resources: Pytree prefix of PartitionSpecs of its results.
      static_argnums: See jax.jit.
      donate_argnums: Indices of arguments whose memory may be reused for results.
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
      compiler_options=compiler_options(self.mesh.devices.flat[0], self._scaled),
    )
    if self._executable is None or fn.__name__ != _INFER_STEP:
      return step
    return SavedStep(self._executable, step, self.mesh)

  def get_local_chunk_info(
    self, global_shape: tuple[int, ...], mesh_axes: Sequence[str | Sequence[str] | None]
  ) -> partitioning.LocalChunkInfo:
    """Return the slice of an array that this process holds.

    T5X's own method does not support an array axis that is split by several mesh axes.

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
      whole = True  # whether this process holds all earlier axes whole
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
  """A step whose compiled program is loaded from a file at the first call.

  Args:
    path: The file.
    step: The step that the file's program replaces.
    mesh: Mesh that the step runs on.
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
      loaded = saved_program.load(self.path, self.step, shapes, self.mesh, described)
      self._loaded = take_int4(loaded)
    return self._loaded(*arguments)


def describe_step(lowered: jax.stages.Lowered) -> dict[str, str]:
  """Return the identity of a step, with a digest of its program before compilation.

  The program depends on the model, the layouts, the mode and decode_fn.
  """
  return {
    'phase': 't5x_infer_step',
    'program': hashlib.sha256(lowered.as_text().encode()).hexdigest(),
  }
