"""A T5X partitioner over the mesh axes x, y and z, whose shardings are those of the package's layouts."""

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

# T5X's exporter and precompiler ask for an axis of this name. Its size is 1: a batch is not split before the model sees
# it, so any batch size will do; the model's own layout splits it.
DATA_AXIS = 'data'


# The function that t5x.utils.get_infer_fn makes of a model's step.
_INFER_STEP = 'infer_step_with_indices'


def inference_mesh(shape: Sequence[int] | Mesh) -> Mesh:
  """The mesh with axes data (of size 1), x, y and z, over the first X*Y*Z devices, or over those of a mesh x, y, z.

  Raises:
    MeshError: fewer devices than that.
  """
  mesh = shape if isinstance(shape, Mesh) else make_mesh(shape)
  return Mesh(mesh.devices[None], (DATA_AXIS, *AXES))


def partitioner_rules(layout: Layout) -> Rules:
  """What T5X needs beside the layout's own rules: how it splits batches."""
  return (('batch', DATA_AXIS), *logical_axis_rules(layout))


class InferencePartitioner(partitioning.PjitPartitioner):
  """Runs T5X's functions on an inference_mesh, with the rules of a layout (sharding.axis_rules).

  T5X takes from the rules how weights lie: to restore them, to partition functions of them and to write model-info.txt.
  They are the same in both phases. The rules of one phase's activations (phase_rules) are in force nowhere: prefill,
  decode steps and scores run per shard, with shardings of their own, taken from the same placement; so does the KV
  cache between them, whose sharding T5X leaves open. Nor are weights declared anew in a phase, which T5X's modules do,
  and under rules without the weights' names gathers them all.

  Args:
    model: an InferenceModel, whose mesh and layout these are then.
    mesh: 'XxYxZ', for when there is no model yet.
    layout: then, 'feedforward/attention'; of both phases, either.
    executable: a file of saved_step.save_infer_step, which runs t5x.infer's step instead of compiling it. Loading it runs
      code: it has to be of your own making.

  Raises:
    MeshError: neither model nor mesh or both, or more devices than there are.
  """

  def __init__(
    self,
    model: Any = None,
    mesh: str | None = None,
    layout: str = 'ws_2d/batch',
    executable: str | os.PathLike | None = None,
  ):
    if (model is None) == (mesh is None):
      raise MeshError('InferencePartitioner takes either a model, to share its mesh, or a mesh')
    self._inference_mesh = model.model.mesh if mesh is None else inference_mesh(parse_mesh(mesh))
    layout = model.model.prefill_layout if mesh is None else Layout.parse(layout)
    self._host_driven = model is not None and model.refills
    if self._host_driven and executable is not None:
      raise RequestError(
        'InferencePartitioner.executable holds a compiled step, and a model with refill has none: use one '
        'of the two'
      )
    self._executable = executable
    if executable is not None:
      saved_program.read_program_header(
        executable
      )  # a wrong path is found out now, not after the weights are restored
    super().__init__(
      num_partitions=self._inference_mesh.size, logical_axis_rules=partitioner_rules(layout)
    )

  def phase_rules(self, sharding: ActivationSharding) -> Rules:
    """The rules of a phase in front of the partitioner's own.

    For code beside the model: a decode_fn, say, that constrains the cache with flax's with_logical_constraint.

    Args:
      placement: Model.prefill_sharding's or Model.decode_sharding's.
    """
    return (*activation_rules(sharding), *self.logical_axis_rules)

  @property
  def mesh(self) -> Mesh:
    return self._inference_mesh

  def partition(
    self,
    fn: Callable,
    in_axis_resources,
    out_axis_resources,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
  ) -> jax.stages.Wrapped | HostStep:
    """As T5X's: pytree prefixes of PartitionSpecs, where None means replicated.

    The step of a model that refills slots is not compiled, but run on the host.

    Nothing is put in force around the function: shardings and the model's own mesh are concrete.
    """
    if self._host_driven and fn.__name__ == _INFER_STEP:
      return HostStep(fn, self.mesh)

    def shardings(specs):
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
    """The slice of an array that this process holds; T5X's own version takes no tuples of mesh axes.

    Raises:
      MeshError: the process holds several slices that do not touch.
    """
    chunker = self._local_chunker
    slices, used = [], set()
    for size, axes in itertools.zip_longest(global_shape, mesh_axes):
      axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
      used.update(axes)
      chunk, chunks, whole = 0, 1, True  # whole: no earlier axis is split within the process
      for axis in axes:
        if chunker.num_chunks[axis] > 1 and not whole:
          raise MeshError(
            f'on the mesh {mesh_text(self.mesh)} a process does not hold one contiguous slice of an '
            f'array split over {axes}: let the first of these axes cross processes'
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
    path: the file.
    step: what would be compiled.
    mesh: its devices.
  """

  def __init__(self, path: str | os.PathLike, step: jax.stages.Wrapped, mesh: Mesh):
    self.path, self.step, self.mesh = path, step, mesh
    self._loaded = None

  def __call__(self, *arguments):
    """Raises SavedError where the file holds another program than this step with these arguments."""
    if self._loaded is None:
      shapes = saved_program.shapes(arguments)
      described = describe_step(self.step.lower(*shapes))
      self._loaded = saved_program.load(self.path, self.step, shapes, self.mesh, described)
    return self._loaded(*arguments)


def describe_step(lowered: jax.stages.Lowered) -> dict[str, str]:
  """What identifies a step: the program before compilation, which model, layouts, mode and decode_fn all change."""
  return {
    'phase': 't5x_infer_step',
    'program': hashlib.sha256(lowered.as_text().encode()).hexdigest(),
  }
