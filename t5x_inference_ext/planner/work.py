"""The work of one chip in a pass. It is counted from the packed arrays, so it includes padding."""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.planner.case import PassCase, packed_weights
from t5x_inference_ext.planner.machine import Mesh
from t5x_inference_ext.planner.network import axis_sizes
from t5x_inference_ext.quantization.formats import bits_of, stored_size
from t5x_inference_ext.sharding.layout import num_shards
from t5x_inference_ext.sharding.packing import tensor_dtype

# Bytes that move in HBM for each logit of attention, and for each element of a layer's columns and
# residual stream, in programs compiled for v4. Softmax is four passes over float32 logits:
# attention of one layer of PaLM 540B takes 74 us in a prefill of 2048 tokens, 49 us in a decode
# step at 32,768 positions, where products and cache explain 16 and 28. Norm, SwiGLU and rotary
# embeddings read and write each bfloat16 element once: 101 us a layer of that prefill.
_PASSES_BYTES = 16
_ELEMENT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class PassWork:
  """FLOPs and bytes of one chip in one pass.

  Attributes:
    matmul_flops: FLOPs of the products with the layers' matrices.
    matmul_rows: Rows of each of these products.
    logits_flops: FLOPs of the unembedding.
    logits_rows: Rows of the unembedding's product.
    attention_flops: FLOPs of attention's two products, with keys and with values.
    weight_bytes: Bytes read of matrices, scales, norms, biases and the head (if it is tied, the
      embedding). Gathered matrices are counted whole.
    head_bytes: The head's part of weight_bytes.
    unpacking_bytes: Bytes whose reading takes as long as products by int4 weights take beyond
      reading these weights (hardware.Chip.int4_load_bytes).
    cache_bytes: Bytes of keys and values that attention reads.
    softmax_bytes: Bytes of attention's logits that softmax reads and writes, as compiled.
    elementwise_bytes: Bytes that other elementwise operations read and write, as compiled.
  """

  matmul_flops: float
  matmul_rows: float
  logits_flops: float
  logits_rows: float
  attention_flops: float
  weight_bytes: float
  head_bytes: float
  unpacking_bytes: float
  cache_bytes: float
  softmax_bytes: float
  elementwise_bytes: float


def work(case: PassCase) -> PassWork:
  """Count the work of a pass on one chip."""
  c, p, chips = case.config, case.sharding, case.machine.chips
  tokens = case.batch * case.padded
  gathered = case.size(case.layout.gathered_axes)
  stored = stored_weights(case)
  table = case.head.shape[0] * c.d_model
  rows = case.batch / case.size(p.attention_rows)
  positions = case.padded / case.size(p.attention_positions)
  unembedded = tokens if case.phase == 'verify' else case.batch  # else only last positions
  # Two products, 2 FLOPs each per element. Positions that the mask hides are computed, too.
  logits = rows * positions * p.heads.heads * case.seen * c.num_layers
  return PassWork(
    matmul_flops=2 * tokens * stored.elements / chips,
    matmul_rows=tokens / gathered,
    logits_flops=2 * unembedded * table / chips,
    logits_rows=unembedded,
    attention_flops=4 * logits * c.d_head,
    weight_bytes=stored.matrices * gathered + stored.vectors + stored.head,
    head_bytes=stored.head,
    unpacking_bytes=stored.int4 * gathered * (case.machine.chip.int4_load_bytes / 0.5 - 1),
    cache_bytes=cache_bytes(case, case.seen),
    softmax_bytes=_PASSES_BYTES * logits,
    elementwise_bytes=_ELEMENT_BYTES * c.num_layers * tokens / gathered * _elements(case),
  )


def _elements(case: PassCase) -> float:
  """Return the elements of a token on one chip, of columns and of the residual stream, in a layer.

  Each norm and each residual sum goes over the stream.
  """
  c, layout = case.config, case.layout
  columns = c.d_ff * len(c.mlp_inputs) + c.num_heads * c.d_head
  stream = 2 * len(c.block_parts) * c.d_model
  return columns / case.size(layout.hidden_axes) + stream / case.size(layout.embed_axes)


class StoredWeights(NamedTuple):
  """The weights of all layers, and the tables.

  Attributes:
    elements: Elements of the matrices on all chips, padding included.
    matrices: Bytes of the matrices on one chip.
    int4: Bytes of those in int4.
    vectors: Bytes of scales, norms and biases on one chip.
    head: Bytes of the head on one chip; if it is tied, of the embedding.
    tables: Bytes of the other tables on one chip. Only few of their rows are read in a pass.
  """

  elements: int
  matrices: int
  int4: int
  vectors: int
  head: int
  tables: int

  @property
  def bytes(self) -> int:
    """Bytes on one chip."""
    return self.matrices + self.vectors + self.head + self.tables


def stored_weights(case: PassCase) -> StoredWeights:
  """Return the sizes of the stored weights, which do not depend on rows, positions or phase."""
  return _stored_weights(*case.packing)


@functools.lru_cache(maxsize=4096)
def _stored_weights(
  config: ModelConfig, one_dimensional: bool, mesh: Mesh, weights: str
) -> StoredWeights:
  tensors, sizes = packed_weights(config, one_dimensional, mesh, weights), axis_sizes(mesh)
  head = tensors['embedding' if config.tied_head else 'head']
  elements, found = 0, dict.fromkeys(('matrices', 'int4', 'vectors', 'head', 'tables'), 0)
  for tensor in tensors.values():
    split = itertools.chain.from_iterable(
      (axes,) if isinstance(axes, str) else axes or () for axes in tensor.spec
    )
    layers = config.num_layers if tensor.per_layer else 1
    count = math.prod(tensor.shape) // num_shards(tuple(split), sizes) * layers
    dtype = tensor_dtype(tensor, weights, 'bfloat16')
    size = stored_size(count, dtype)
    if tensor.kind == 'matrix':
      elements += math.prod(tensor.shape) * config.num_layers
      found['matrices'] += size
      found['int4'] += size if bits_of(dtype) == 4 else 0
    elif tensor is head:
      found['head'] += size
    else:
      found['tables' if tensor.kind == 'embedding' else 'vectors'] += size
  return StoredWeights(elements, **found)


def cache_bytes(case: PassCase, positions: int) -> float:
  """Return the bytes on one chip of keys and values, in all layers.

  Args:
    case: The pass.
    positions: Number of positions of each row to count.
  """
  c, p = case.config, case.sharding
  row_layers = 2 * c.num_layers * case.batch / case.size(p.attention_rows)
  return row_layers * positions * p.heads.kv_heads * case.cached_head_bytes
