"""An adapter as canonical tensors: what it adds to a model's matrices, activations or prompts."""

from collections.abc import Mapping
import dataclasses
import zlib

import numpy as np
import numpy.typing as npt

from t5x_inference_ext.checkpoints.manifest import checksum
from t5x_inference_ext.errors import CheckpointError

Floats = npt.NDArray[np.float32]
_LARGEST = 3.389e38  # almost the largest number of bfloat16, in which adapters may be served


@dataclasses.dataclass(frozen=True)
class LowRank:
  """A LoRA of one canonical matrix [L, in, out]: x @ a @ b is added to the matrix's product.

  Attributes:
    a: [L, in, R].
    b: [L, R, out]. Its values include the adapter's scale.
  """

  a: Floats
  b: Floats

  @property
  def rank(self) -> int:
    """R, the largest rank of all layers."""
    return self.a.shape[2]


@dataclasses.dataclass(frozen=True)
class Adapter:
  """One adapter, whose tensors fit one model. All values are finite.

  Attributes:
    path: Directory or file that it was read from.
    low_rank: LoRA: canonical matrix -> its low-rank term.
    scaling: (IA)^3: 'query', 'key' or 'value' -> [L, columns], factors of that product, bias
      included; 'mlp_output' -> [L, F], factors of the MLP's activated columns.
    prompt: Soft prompt [P, E], embeddings in front of the row's tokens; None: none.
  """

  path: str
  low_rank: Mapping[str, LowRank] = dataclasses.field(default_factory=dict)
  scaling: Mapping[str, Floats] = dataclasses.field(default_factory=dict)
  prompt: Floats | None = None

  @property
  def crc32(self) -> int:
    """CRC-32 of all values, which identifies the adapter whatever its path."""
    total = 0
    for name in sorted(self.low_rank):
      for values in (self.low_rank[name].a, self.low_rank[name].b):
        total = checksum(values, zlib.crc32(name.encode(), total))
    for name in sorted(self.scaling):
      total = checksum(self.scaling[name], zlib.crc32(name.encode(), total))
    return total if self.prompt is None else checksum(self.prompt, total)


def finite_floats(values: np.ndarray, name: str, path: str) -> Floats:
  """Return values as float32.

  Raises:
    CheckpointError: They hold NaN, or values that are infinite in bfloat16, which would reach rows
      of other adapters.
  """
  with np.errstate(over='ignore'):
    found = values.astype(np.float32)
  if not (np.abs(found) <= _LARGEST).all():
    raise CheckpointError(
      f'{name}: NaN or infinite values, read from {path}: take an adapter from before training '
      'diverged'
    )
  return found
