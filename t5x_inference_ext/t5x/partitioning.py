"""A T5X partitioner over the mesh axes x, y and z, whose shardings are those of the package's layouts."""

import itertools
from typing import Any, Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from t5x import partitioning

from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.layouts.mesh import AXES, make_mesh, mesh_text, parse_mesh

# T5X's exporter and precompiler ask for an axis of this name. Its size is 1: a batch is not split before the model sees
# it, so any batch size will do; the model's own layout splits it.
DATA_AXIS = 'data'


def inference_mesh(shape: Sequence[int]) -> Mesh:
  """The mesh with axes data (of size 1), x, y and z, over the first X*Y*Z devices.

  Raises:
    MeshError: fewer devices than that.
  """
  return Mesh(make_mesh(shape).devices[None], (DATA_AXIS, *AXES))


def logical_axis(mesh_axes: str | Sequence[str] | None) -> str | None:
  """The logical name of a dimension split over these mesh axes: the axes' names in one word, e.g. 'yz'.

  The layouts say over which mesh axes each dimension is split. Naming a dimension after that leaves axis rules nothing
  to decide, so that they hold for every layout.
  """
  if mesh_axes is None or isinstance(mesh_axes, str):
    return mesh_axes
  return ''.join(mesh_axes) or None


AXIS_RULES = (('batch', DATA_AXIS),) + tuple(
    (logical_axis(axes), axes) for n in range(1, len(AXES) + 1) for axes in itertools.permutations(AXES, n))


class InferencePartitioner(partitioning.PjitPartitioner):
  """Runs T5X's functions on an inference_mesh.

  Args:
    model: an InferenceModel, whose mesh this one is then.
    mesh: 'XxYxZ', for when there is no model yet.

  Raises:
    MeshError: neither or both, or more devices than there are.
  """

  def __init__(self, model: Any = None, mesh: str | None = None):
    if (model is None) == (mesh is None):
      raise MeshError('InferencePartitioner takes either a model, to share its mesh, or a mesh')
    self._inference_mesh = model.model.mesh if mesh is None else inference_mesh(parse_mesh(mesh))
    super().__init__(num_partitions=self._inference_mesh.size, logical_axis_rules=AXIS_RULES)

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
  ) -> jax.stages.Wrapped:
    """As T5X's: pytree prefixes of PartitionSpecs, where None means replicated.

    Nothing is put in force around the function: shardings and the model's own mesh are concrete.
    """

    def shardings(specs):
      return jax.tree.map(
          lambda spec: NamedSharding(self.mesh, P() if spec is None else spec), specs,
          is_leaf=lambda x: x is None or isinstance(x, P))

    return jax.jit(
        fn, in_shardings=shardings(in_axis_resources), out_shardings=shardings(out_axis_resources),
        static_argnums=static_argnums, donate_argnums=donate_argnums)

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
          raise MeshError(f'on the mesh {mesh_text(self.mesh)} a process does not hold one contiguous slice of an '
                          f'array split over {axes}: let the first of these axes cross processes')
        whole &= self.mesh.local_mesh.shape[axis] == 1
        chunk = chunk * chunker.num_chunks[axis] + chunker.chunk_ids[axis]
        chunks *= chunker.num_chunks[axis]
      length = size // chunks
      slices.append(slice(chunk * length, (chunk + 1) * length) if axes else slice(None))
    return partitioning.LocalChunkInfo(tuple(slices), chunker.get_replica_id(used))

