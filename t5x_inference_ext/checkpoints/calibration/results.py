"""Files of a calibration: rounded layers, and the residual stream before the next layer.

OUTPUT.unfinished/calibration/
  stream-3           [rows, T, E] float32, before layer 3; layers 0 to 2 are done
  layer-2/           a rounded layer
    query            int8 units, of the same size for int4
    query_scale      float32
    errors           JSON: the rounding errors of each matrix

A name appears when its content is complete. `stream-3` appears before `layer-2`, which ends the
work on layer 2; then `stream-2` is removed.
"""

from collections.abc import Mapping
import json
import os

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.conversion import files
from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.checkpoints.tensor import Bounds, Tensor
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.quantization.nibbles import INT4

_NEW = '.new'
_ERRORS = 'errors'


class CalibratedTensor(Tensor):
  """A matrix [L, in, out], or its scales [L, out], in the files of a calibration."""

  def __init__(self, directory: str, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
    super().__init__(shape, dtype, os.path.join(directory, f'layer-*/{name}'))
    self._directory, self._name = directory, name
    self.chunk = (1, *self.shape[1:])

  def _read(self, bounds: Bounds) -> np.ndarray:
    (begin, end), *within = bounds
    stored = np.dtype(np.int8) if self.dtype == INT4 else self.dtype
    layers = []
    for layer in range(begin, end):
      path = os.path.join(layer_path(self._directory, layer), self._name)
      values = np.memmap(path, stored, 'r', shape=self.shape[1:])
      layers.append(values[tuple(slice(*b) for b in within)])
    found = np.stack(layers)
    return found.view(INT4) if self.dtype == INT4 else found


class CalibrationResults:
  """The results of a calibration, in a directory."""

  def __init__(self, directory: str, config: ModelConfig, stream_shape: tuple[int, ...]) -> None:
    self._directory, self._config = directory, config
    self._stream_shape = stream_shape

  def make_directory(self) -> None:
    """Make the directory, if it does not exist."""
    os.makedirs(self._directory, exist_ok=True)

  @property
  def layers_done(self) -> int:
    """Number of layers that are rounded, from the first one on."""
    done = 0
    while os.path.isdir(layer_path(self._directory, done)):
      done += 1
    return done

  def has_stream(self, layer: int) -> bool:
    """Return whether the residual stream before a layer is complete."""
    return os.path.isfile(self._stream(layer))

  def stream(self, layer: int) -> np.ndarray:
    """Return the residual stream [rows, T, E] before a layer, mapped from its file."""
    return np.memmap(self._stream(layer), np.float32, 'r', shape=self._stream_shape)

  def begin_stream(self, layer: int) -> None:
    """Make the file of the residual stream before a layer, with its disk space."""
    files.remove_file(self._stream(layer) + _NEW)
    files.allocate(self._stream(layer) + _NEW, 4 * int(np.prod(self._stream_shape)))

  def write_stream(self, layer: int, first: int, values: np.ndarray) -> None:
    """Write some rows of the residual stream before a layer, from row `first` on."""
    _, length, features = self._stream_shape
    index = slice(first, first + len(values)), slice(0, length), slice(0, features)
    files.write_blocks(self._stream(layer) + _NEW, self._stream_shape, [(index, values)])

  def end_stream(self, layer: int) -> None:
    """Give the residual stream before a layer its final name."""
    files.sync(self._stream(layer) + _NEW)
    files.publish(self._stream(layer) + _NEW, self._stream(layer))

  def write_layer(
    self, layer: int, tensors: Mapping[str, np.ndarray], errors: Mapping[str, RoundingError]
  ) -> None:
    """Write a rounded layer, and remove the residual stream before it."""
    path = layer_path(self._directory, layer)
    files.remove(path + _NEW)
    os.mkdir(path + _NEW)
    for name, values in tensors.items():
      files.write_file(os.path.join(path + _NEW, name), np.ascontiguousarray(values).tobytes())
    listed = {name: vars(error) for name, error in errors.items()}
    files.write_file(os.path.join(path + _NEW, _ERRORS), json.dumps(listed).encode())
    files.publish(path + _NEW, path)
    files.remove_file(self._stream(layer))

  def errors(self) -> dict[str, RoundingError]:
    """Return the rounding errors of each matrix over all layers."""
    found: dict[str, RoundingError] = {}
    for layer in range(self._config.num_layers):
      with open(os.path.join(layer_path(self._directory, layer), _ERRORS), 'rb') as f:
        for name, values in json.load(f).items():
          found.setdefault(name, RoundingError()).merge(RoundingError(**values))
    return found

  def tensors(self, dtypes: Mapping[str, np.dtype]) -> dict[str, Tensor]:
    """Return the matrices and scales by name. They can be read when all layers are rounded.

    Args:
      dtypes: Dtype of each matrix.
    """
    found: dict[str, Tensor] = {}
    declared = params.parameters(self._config)
    for name, dtype in dtypes.items():
      found[name] = CalibratedTensor(self._directory, name, declared[name].shape, dtype)
    for name, p in params.scales(self._config).items():
      found[name] = CalibratedTensor(self._directory, name, p.shape, np.dtype(np.float32))
    return found

  def _stream(self, layer: int) -> str:
    return os.path.join(self._directory, f'stream-{layer}')


def layer_path(directory: str, layer: int) -> str:
  """Return the path of a rounded layer."""
  return os.path.join(directory, f'layer-{layer}')
