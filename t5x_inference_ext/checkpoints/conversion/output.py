"""The interface of the formats that a conversion can write."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from t5x_inference_ext.checkpoints import manifest, serving
from t5x_inference_ext.checkpoints.arrays import Rectangle
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion.raw_array import RawArray, array_files
from t5x_inference_ext.checkpoints.serving_tensor import CHECKSUMS
from t5x_inference_ext.checkpoints.tensor import Bounds

# One write: (array, bounds in the array, values).
ArrayWrite = tuple[RawArray, Bounds, np.ndarray]


class Output:
  """A checkpoint format while it is being written.

  Attributes:
    manifest_name: Name of the manifest's file.
    manifest_format, manifest_version: The manifest's fields `format` and `version`.
    header: Name of the file that is written last. A directory without it is not a checkpoint.
    weights: Format of the matrices: 'float32', or one of a serving checkpoint.
    arrays: All arrays to write.
  """

  manifest_name: str
  manifest_format: str
  manifest_version: int
  header: str

  def __init__(
    self, source: Checkpoint, weights: str, arrays: tuple[RawArray, ...], record: dict[str, Any]
  ) -> None:
    self.weights, self.arrays = weights, arrays
    self._manifest = {
      'format': self.manifest_format,
      'version': self.manifest_version,
      'written_by': record['written_by'],
      'weights': weights,
      'options': record['options'],
      'model': source.config.to_dict(),
      'source': record['source'],
      'tensors': {
        a.name: {'shape': a.shape, 'dtype': a.dtype.name, 'chunks': a.chunk} for a in arrays
      },
    }

  def dtype(self, name: str) -> np.dtype:
    """Return the dtype in which the canonical tensor `name` is written."""
    raise NotImplementedError

  def placements(self, name: str, rectangle: Rectangle, values: np.ndarray) -> Iterator[ArrayWrite]:
    """Yield the array writes for canonical values [layers, rows, columns]; scales have one row."""
    raise NotImplementedError

  def is_layer_weight(self, array: str) -> bool:
    """Return whether an array holds matrices of the layers, or scales of these matrices."""
    raise NotImplementedError

  def index_files(self) -> dict[str, bytes]:
    """Return the small files of the format besides the manifest: name -> content."""
    return {}

  def headers(
    self, checksums: dict[str, list[int]], errors: dict[str, dict[str, float]]
  ) -> Iterator[tuple[str, bytes]]:
    """Yield the files that describe the arrays, with `header` last.

    Args:
      checksums: CRC-32 of each chunk, by array.
      errors: Rounding errors, by tensor.

    Yields:
      Name and content of a file.
    """
    listed, index = serving.checksums_file(checksums), self.index_files()
    files = {CHECKSUMS: listed, **index, **array_files(self.arrays)}
    described = manifest.write({**self._manifest, 'errors': errors}, files)
    written = {CHECKSUMS: listed, **index, self.manifest_name: described}
    yield from sorted(written.items(), key=lambda item: item[0] == self.header)
