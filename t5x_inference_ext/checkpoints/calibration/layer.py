"""One layer in a calibration: float matrices, replaced by rounded ones product after product."""

from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.calibration import passes
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.conversion.not_finite import check_finite
from t5x_inference_ext.checkpoints.conversion.rounding_error import RoundingError
from t5x_inference_ext.checkpoints.load import load_tensor
from t5x_inference_ext.errors import CheckpointError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import LayerWeights, layer_weights
from t5x_inference_ext.quantization import gptq
from t5x_inference_ext.sharding.packing import PackedTensor

_ATTENTION_INPUTS = ('query', 'key', 'value')


class CalibratedLayer:
  """A layer whose matrices are rounded in the order in which a pass multiplies by them.

  The inputs of each product come from a pass with the rounded matrices before it, also those of
  this layer.

  Attributes:
    tensors: Units int8 [in, out] and scales [out] of the matrices rounded so far, by name.
    errors: Their rounding errors.
  """

  def __init__(
    self,
    source: Checkpoint,
    model: Model,
    packed: Mapping[str, PackedTensor],
    dtypes: Mapping[str, np.dtype],
    layer: int,
  ) -> None:
    self._source, self._model, self._packed = source, model, packed
    self._dtypes, self._layer = dtypes, layer
    self._matrices = {name: self._read(name) for name in dtypes}
    self._vectors = {
      name: load_tensor(source, model, tensor, layer)
      for name, tensor in self._packed.items()
      if tensor.per_layer and tensor.kind != 'matrix'
    }
    self.tensors: dict[str, np.ndarray] = {}
    self.errors: dict[str, RoundingError] = {}

  def _read(self, name: str) -> np.ndarray:
    """Return a matrix [in, out] float32."""
    values = self._source.tensors[name].read((slice(self._layer, self._layer + 1),))
    values = values.astype(np.float32)
    check_finite(self._source, name, values, self._layer, self._dtypes[name])
    return values[0]

  def products(self) -> Iterator[tuple[str, dict[str, tuple[str, ...]]]]:
    """Yield each product's name, and the matrices to round together for each Hessian's name.

    Matrices of a product's columns are rounded alone; those of its rows together, since their
    outputs are summed and have one scale.
    """
    config = self._model.config
    for part in config.block_parts:
      inputs = self._names(f'{part.name}/w_in')
      if config.has_two_norms(part):
        yield (
          f'{part.name}/w_in',
          {
            f'{part.name}/attention': tuple(n for n in inputs if n in _ATTENTION_INPUTS),
            f'{part.name}/w_in': tuple(n for n in inputs if n not in _ATTENTION_INPUTS),
          },
        )
      else:
        yield f'{part.name}/w_in', {f'{part.name}/w_in': inputs}
      yield f'{part.name}/w_out', {f'{part.name}/w_out': self._names(f'{part.name}/w_out')}

  def _names(self, packed: str) -> tuple[str, ...]:
    return tuple(name for part in self._packed[packed].parts for name in part.names)

  def weights(self) -> LayerWeights:
    """Return the layer's weights in float32, of which some are rounded."""
    arrays = dict(self._vectors)
    for name, tensor in self._packed.items():
      whole = tuple(slice(0, n) for n in tensor.shape)
      if tensor.kind == 'matrix':
        values = tensor.read(lambda n, where: self._matrices[n][None][where], 0, whole)
        arrays[name] = jnp.asarray(values)
    return layer_weights(arrays)

  def round(
    self,
    product: str,
    names: tuple[str, ...],
    hessian: np.ndarray,
    done: Callable[[str, int], None],
  ) -> None:
    """Round matrices for the inputs that a Hessian describes.

    Args:
      product: Name of the product.
      names: The matrices.
      hessian: [inputs, inputs] float32. Mean of x x' over the inputs x.
      done: Called with the name and the bytes of each rounded matrix.
    """
    together = [names] if product.endswith('/w_out') else [(name,) for name in names]
    factor = jnp.asarray(hessian)
    for group in together:
      w = np.concatenate([self._matrices[name] for name in group])
      units, scale = self._quantized(w, factor, group)
      first = 0
      for name in group:
        before = self._matrices[name]
        own = units[first : first + len(before)]
        first += len(before)
        after = own.astype(np.float32) * scale
        self.errors[name] = error = RoundingError()
        error.add(before, after)
        self._matrices[name] = after
        self.tensors[name] = own
        self.tensors[str(params.parameters(self._model.config)[name].scale)] = scale
        done(name, before.nbytes)

  def _quantized(
    self, w: np.ndarray, hessian: jax.Array, names: tuple[str, ...]
  ) -> tuple[np.ndarray, np.ndarray]:
    """Return units int8 and scales, with as much damping as float32 needs."""
    for damping in gptq.DAMPINGS:
      found = passes.quantize_matrix(jnp.asarray(w), hessian, self._dtypes[names[0]], damping)
      units, scale = map(np.asarray, found)
      if np.isfinite(units).all() and np.isfinite(scale).all():
        return units.astype(np.int8), scale
    raise CheckpointError(
      f'{" and ".join(names)} of layer {self._layer} of {self._source.path} have inputs too large '
      'for float32 sums in the calibration: convert without --calibration'
    )
