"""The identity of a checkpoint's weights: a checksum, which receipts record."""

import hashlib
import json
from typing import Any, NamedTuple

import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints.checkpoint import Checkpoint
from t5x_inference_ext.checkpoints.serving_tensor import PackedTensorRows, ServingTensor

# Every identity covers the model's shape and the dtype of its matrices, and one of these:
#   chunks: the recorded checksum of every chunk of a serving checkpoint, and so every value.
#   norms: the values of all norm scales. Training changes them. Merging an adapter into the
#     matrices does not, so merged weights have the identity of the original ones.
COVERS = ('chunks', 'norms')


class WeightsIdentity(NamedTuple):
  """The identity of weights. It does not depend on the checkpoint's path.

  Attributes:
    covers: One of COVERS.
    sha256: 64 hexadecimal digits.
  """

  covers: str
  sha256: str


def weights_identity(checkpoint: Checkpoint) -> WeightsIdentity:
  """Return the identity of a checkpoint's weights.

  For a serving checkpoint, it is computed from checksums that were read at opening. Other formats
  record none, so their norm scales are read.

  Raises:
    CheckpointError: A norm scale can't be read.
  """
  tensors = checkpoint.tensors
  parts: dict[str, Any]
  stored = {n: t.stored if isinstance(t, PackedTensorRows) else t for n, t in tensors.items()}
  if all(isinstance(tensor, ServingTensor) for tensor in stored.values()):
    covers = 'chunks'
    parts = {n: t.checksums for n, t in stored.items() if isinstance(t, ServingTensor)}
  else:
    covers = 'norms'
    parts = {
      name: hashlib.sha256(tensors[name].read().astype(np.float32).tobytes()).hexdigest()
      for name, declared in params.parameters(checkpoint.config).items()
      if declared.kind == 'norm'
    }
  described = {'model': checkpoint.config.to_dict(), 'weights': checkpoint.weights, covers: parts}
  data = json.dumps(described, sort_keys=True).encode()
  return WeightsIdentity(covers, hashlib.sha256(data).hexdigest())
