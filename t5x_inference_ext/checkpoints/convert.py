"""Any checkpoint into a serving checkpoint, slice by slice.

A slice is all rows of one column of chunks, of some layers: everything that is summed into its output channels, so that
their scales need only one reading of the source. It spans as many layers as slice_bytes allow, because T5X's chunks
usually span all layers: taken layer by layer, each chunk would be decoded once a layer. Host memory is a few times
slice_bytes (or one layer's column of chunks, where that is more: 0.7 GiB of float32 for palm_540b) and
storage.CACHE_BYTES.
"""

import dataclasses
import importlib.metadata
import os
from typing import Callable, Iterator

import numpy as np

from t5x_inference_ext import parameters
from t5x_inference_ext.checkpoints import serving
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.output import OutputDirectory
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, UserError
from t5x_inference_ext.quantization import rounding

SLICE_BYTES = 2 * 2**30

# (what is being done, bytes of the source it was, bytes of the source in all)
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass
class RoundingError:
  """How far what was written is from the source, of one tensor.

  Attributes:
    largest: max|w' - w|.
    magnitude: max|w|.
    squares: the sum of (w' - w)^2.
    norm: the sum of w^2.
  """

  largest: float = 0.
  magnitude: float = 0.
  squares: float = 0.
  norm: float = 0.

  def add(self, w: np.ndarray, written: np.ndarray) -> None:
    """Counts a block w (any float) and what serving will see of it."""
    w = w.astype(np.float32, copy=False)
    difference = written.astype(np.float32, copy=False) - w
    self.largest = max(self.largest, float(difference.max()), -float(difference.min()))
    self.magnitude = max(self.magnitude, float(w.max()), -float(w.min()))
    self.squares += float(np.vdot(difference, difference))
    self.norm += float(np.vdot(w, w))

  @property
  def worst(self) -> float:
    """max|w' - w| / max|w|."""
    return self.largest / self.magnitude if self.magnitude else 0.

  @property
  def relative(self) -> float:
    """||w' - w|| / ||w||."""
    return (self.squares / self.norm)**.5 if self.norm else 0.


@dataclasses.dataclass(frozen=True)
class Report:
  """What a conversion did.

  Attributes:
    source: the checkpoint read.
    output: the directory written.
    weights: what it holds.
    errors: of each float tensor.
    source_bytes: of the source's parameters, uncompressed.
    output_bytes: on disk, everything.
    layer_bytes: on disk, matrices and their scales.
    layer_float32_bytes: what the matrices would take as float32.
  """

  source: Checkpoint
  output: str
  weights: str
  errors: dict[str, RoundingError]
  source_bytes: int
  output_bytes: int
  layer_bytes: int
  layer_float32_bytes: int


def convert(input_checkpoint: str, output_checkpoint: str, weights: str = 'int8', norm_scale: str | None = None, *,
            config: ModelConfig | None = None, rescale_logits: bool | None = None, slice_bytes: int = SLICE_BYTES,
            found: Callable[[Checkpoint], None] = lambda checkpoint: None,
            progress: Progress = lambda what, done, total: None) -> Report:
  """Writes the serving checkpoint `output_checkpoint`: complete and verified, or not at all.

  Args:
    input_checkpoint: a checkpoint of any format.
    output_checkpoint: the directory to make, of any name.
    weights: 'int8' or 'bfloat16'.
    norm_scale, config, rescale_logits: see open_checkpoint.
    slice_bytes: how much of the source to hold at a time.
    found: told what the input is before anything is converted.
    progress: told after every slice.

  Raises:
    CheckpointError: the input can't be read, or holds NaN or infinite values; the output exists.
    UserError: unknown weights.
  """
  if weights not in serving.WEIGHTS:
    raise UserError(f'weights must be one of {", ".join(serving.WEIGHTS)}, got {weights!r}')
  output = OutputDirectory(output_checkpoint)
  output.check_absent()
  source = open_checkpoint(input_checkpoint, norm_scale=norm_scale, config=config, rescale_logits=rescale_logits)
  found(source)
  with output:
    conversion = _Conversion(source, weights, output.directory, progress)
    conversion.run(slice_bytes)
    serving.write_header(output.directory, source.config, weights, _provenance(source), _version(),
                         conversion.checksums())
    verify(output.directory, progress)
    names = serving.contents(source.config, weights)
    sizes = {name: _disk_usage(os.path.join(output.directory, name)) for name in names}
    total = _disk_usage(output.directory)
    output.finish()
  kinds = {**parameters.parameters(source.config), **parameters.scales(source.config)}
  return Report(
      source, output.path, weights, conversion.errors,
      source_bytes=sum(t.nbytes for t in source.tensors.values()),
      output_bytes=total,
      layer_bytes=sum(size for name, size in sizes.items() if kinds[name].kind in ('matrix', 'scale')),
      layer_float32_bytes=sum(4 * int(np.prod(p.shape)) for p in kinds.values() if p.kind == 'matrix'))


def verify(path: str, progress: Progress = lambda what, done, total: None) -> None:
  """Reads a serving checkpoint back from the disk. Raises CheckpointError where a checksum is not the one recorded."""
  with open(os.path.join(path, serving.CONFIG), 'rb') as f:
    header, config = serving.read_header(path, f.read())
  tensors = serving.read_tensors(path, config, header['weights'], cached=False)
  total = sum(t.nbytes for t in tensors.values())
  for name, tensor in tensors.items():
    tensor.verify()
    progress(f'verify {name}', tensor.nbytes, total)


class _Conversion:
  """The tensors of one source on their way into a directory."""

  def __init__(self, source: Checkpoint, weights: str, directory: str, progress: Progress):
    self._source, self._weights, self._progress = source, weights, progress
    self._total = sum(t.nbytes for t in source.tensors.values())
    self._writers = {name: serving.TensorWriter(directory, name, shape, dtype)
                     for name, (shape, dtype) in serving.contents(source.config, weights).items()}
    # Small beside a slice (90 MB for palm_540b): kept, and written last.
    self._scales = {name: np.empty(p.shape, np.float32) for name, p in parameters.scales(source.config).items()
                    if weights == 'int8'}
    self.errors = {name: RoundingError() for name in parameters.parameters(source.config)}

  def run(self, slice_bytes: int) -> None:
    shared = {}  # scale name -> the matrices that have it
    for name, p in parameters.parameters(self._source.config).items():
      if p.kind == 'matrix':
        shared.setdefault(p.scale, []).append(name)
      else:
        self._copy(name)
    layers = self._source.config.num_layers
    for scale, names in shared.items():
      for begin, end in self._columns(names):
        tensors = [self._source.tensors[name] for name in names]
        layer_bytes = sum(t.shape[1] * (end - begin) * t.dtype.itemsize for t in tensors)
        step = max(1, slice_bytes // layer_bytes)
        for first in range(0, layers, step):
          self._slice(slice(first, min(first + step, layers)), scale, names, slice(begin, end))
    for name, scales in self._scales.items():
      for layer in range(layers):
        self._writers[name].write((layer, 0), scales[layer:layer + 1])

  def checksums(self) -> dict[str, list[int]]:
    return {name: writer.checksums() for name, writer in self._writers.items()}

  def _columns(self, names: list[str]) -> Iterator[tuple[int, int]]:
    """Ranges of columns that are whole chunks of every named matrix: they have as many columns, so the same chunks."""
    writer = self._writers[names[0]]
    for begin in range(0, writer.shape[2], writer.chunk[2]):
      yield begin, min(begin + writer.chunk[2], writer.shape[2])

  def _copy(self, name: str) -> None:
    """A norm or the embedding, one row of chunks after another."""
    tensor, writer = self._source.tensors[name], self._writers[name]
    for begin in range(0, tensor.shape[0], writer.chunk[0]):
      values = tensor.read((slice(begin, begin + writer.chunk[0]),))
      self._check(name, begin if serving.is_layered(name) else None, values)
      written = values.astype(writer.dtype)
      self.errors[name].add(values, written)
      writer.write((begin,) + (0,) * (values.ndim - 1), written)
      self._progress(name, values.nbytes, self._total)

  def _slice(self, layers: slice, scale_name: str, names: list[str], columns: slice) -> None:
    """Some columns of some layers of the matrices that share a scale."""
    tensors = self._source.tensors
    values = {name: tensors[name].read((layers, slice(None), columns)) for name in names}
    scales = tensors[scale_name].read((layers, columns)) if self._source.weights == 'int8' else None
    for i, layer in enumerate(range(layers.start, layers.stop)):
      of_layer = {name: w[i] for name, w in values.items()}
      done = sum(w.nbytes for w in of_layer.values())
      for name, w in of_layer.items():
        self._check(name, layer, w)
      scale = None
      if scales is not None:
        scale = scales[i]
        done += scale.nbytes
        self._check(scale_name, layer, scale)
      elif self._weights == 'int8':
        scale = rounding.channel_scales(*of_layer.values())
      for name, w in of_layer.items():
        self._matrix(name, layer, columns.start, w, scale)
      if self._weights == 'int8':
        self._scales[scale_name][layer, columns] = scale
      self._progress(f'layer {layer} {" ".join(names)}', done, self._total)

  def _matrix(self, name: str, layer: int, begin: int, w: np.ndarray, scale: np.ndarray | None) -> None:
    """Writes w [in, columns]: float or int8, as int8 or bfloat16; `scale` [columns] where one of the two is int8."""
    writer = self._writers[name]
    is_int8 = w.dtype == np.int8
    if self._weights == 'int8':
      written = w if is_int8 else rounding.quantize(w, scale)
    else:
      written = np.empty(w.shape, writer.dtype)
      for source, target in zip(rounding.row_blocks(w), rounding.row_blocks(written)):
        target[...] = rounding.dequantize(source, scale) if is_int8 else source
    for source, target in zip(rounding.row_blocks(w), rounding.row_blocks(written)):
      self.errors[name].add(rounding.dequantize(source, scale) if is_int8 else source,
                            rounding.dequantize(target, scale) if self._weights == 'int8' else target)
    writer.write((layer, 0, begin), written[None])

  def _check(self, name: str, layer: int | None, values: np.ndarray) -> None:
    """Raises CheckpointError if any value is NaN or infinite."""
    if values.dtype.kind == 'i' or _finite(values):
      return
    tensor = self._source.tensors[name]
    where, whole = '', (slice(None),)
    if layer is not None:
      where, whole = f' in layer {layer}', (slice(layer, layer + 1),)
    count = _count_bad(tensor, whole)
    raise CheckpointError(f'{name}: {count} NaN or infinite values{where}, read from {tensor.path}: take a checkpoint '
                          'from before training diverged')


def _finite(values: np.ndarray) -> bool:
  return all(bool(np.isfinite(block).all()) for block in rounding.row_blocks(values.reshape(-1, values.shape[-1])))


def _count_bad(tensor: Tensor, where: tuple[slice, ...]) -> int:
  """How many values are not finite, in the whole layer, not only in the slice that showed it."""
  axis = len(where) if len(tensor.shape) > len(where) else 0
  bounds = [s.indices(n)[:2] for s, n in zip(where + (slice(None),) * len(tensor.shape), tensor.shape)]
  step = max(1, 2**24 // max(1, int(np.prod([e - b for i, (b, e) in enumerate(bounds) if i != axis]))))
  count = 0
  for begin in range(bounds[axis][0], bounds[axis][1], step):
    index = [slice(*b) for b in bounds]
    index[axis] = slice(begin, min(begin + step, bounds[axis][1]))
    values = tensor.read(tuple(index))
    count += values.size - int(np.isfinite(values).sum())
  return count


def _provenance(source: Checkpoint) -> dict:
  return {'path': source.path, 'format': source.format, 'step': source.step, 'notes': list(source.notes)}


def _version() -> str:
  try:
    return importlib.metadata.version('t5x_inference_ext')
  except importlib.metadata.PackageNotFoundError:
    return 'from source'


def _disk_usage(path: str) -> int:
  """Bytes in all files below a directory."""
  return sum(os.path.getsize(os.path.join(root, name)) for root, _, names in os.walk(path) for name in names)
