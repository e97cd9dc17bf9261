"""Adapters of rows: low-rank terms beside the products (LoRA), and factors of columns ((IA)^3).

Each row of a pass has the number of its adapter; 0 is none. The terms of all adapters are computed
by one product, of which each row keeps its own ranks: the inner products of other adapters become
zeros. So rows with any adapters share a batch and a program, and no matrix is copied for a row.
"""

from collections.abc import Mapping, Sequence
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from t5x_inference_ext.config import BlockPart, ModelConfig
from t5x_inference_ext.model.collectives import ops
from t5x_inference_ext.model.weights import BlockPartWeights
from t5x_inference_ext.quantization import int8
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.columns import PackedPart, input_parts, output_parts
from t5x_inference_ext.sharding.layout import Axes

SCALING = 'scaling/'
_SCALED_HEADS = ('query', 'key', 'value')


@dataclasses.dataclass(frozen=True, eq=False)
class RowAdapters:
  """The adapters of some rows in one block part, on one shard.

  Attributes:
    rows: [b] int32. Number of each row's adapter; 0: none.
    parts: Parts of a shard's columns of the input matrix.
    out_parts: Parts of a shard's rows of the output matrix.
  """

  rows: Int[Array, ' b']
  parts: tuple[PackedPart, ...]
  out_parts: tuple[PackedPart, ...]

  @classmethod
  def of(
    cls, rows: Int[Array, ' b'], config: ModelConfig, part: BlockPart, sharding: ActivationSharding
  ) -> 'RowAdapters':
    """Return the adapters of rows in a block part."""
    shards = sharding.heads.stored.shards
    return cls(rows, input_parts(config, part, shards), output_parts(config, part, shards))

  def input_terms(
    self, y: Float[Array, 'b t e'], w: BlockPartWeights, columns: slice = slice(None)
  ) -> Float[Array, 'b t columns'] | None:
    """Return the terms of a shard's columns of an input product; None if no adapter has any.

    Args:
      y: Factor of the input product.
      w: This shard's weights.
      columns: The columns, whole parts; all by default.
    """
    parts, ranks = self._parts(w, columns)
    if not ranks:
      return None
    inner = int8.matmul(y, w.adapters['in_a'][:, ranks])
    inner = self._own(inner, w.adapters['in_owners'][ranks])
    terms, first = [], 0
    for part in parts:
      b = w.adapters.get(f'in_b/{part.names[0]}')
      if b is None:
        terms.append(jnp.zeros((*y.shape[:2], part.width), y.dtype))
      else:
        terms.append(int8.matmul(inner[..., first : first + b.shape[0]], b))
        first += b.shape[0]
    return jnp.concatenate(terms, axis=-1)

  def gathered_input_terms(
    self, y: Float[Array, 'b t E'], w: BlockPartWeights, columns: slice, embed: Axes, hidden: Axes
  ) -> Float[Array, 'b t columns'] | None:
    """Return the terms of columns whose matrices are gathered, as WeightGathered orders them.

    Args:
      y: Factor of the input product.
      w: This shard's weights.
      columns: The columns of a shard, whole parts.
      embed: Axes over which the matrix's rows are gathered.
      hidden: Axes over which its columns are gathered.
    """
    parts, ranks = self._parts(w, columns)
    if not ranks:
      return None
    inner = int8.matmul(y, ops.all_gather(w.adapters['in_a'][:, ranks], embed, 0))
    inner = self._own(inner, w.adapters['in_owners'][ranks])
    # A gathered block has the columns of all parts, shard after shard: one matrix serves them.
    b = jnp.zeros((inner.shape[-1], sum(part.width for part in parts)), y.dtype)
    first, offset = 0, 0
    for part in parts:
      block = w.adapters.get(f'in_b/{part.names[0]}')
      if block is not None:
        b = jax.lax.dynamic_update_slice(b, block, (first, offset))
        first += block.shape[0]
      offset += part.width
    return int8.matmul(inner, ops.all_gather(b, hidden, 1))

  def output_terms(
    self, y: Float[Array, 'b t rows'], w: BlockPartWeights
  ) -> Float[Array, 'b t e'] | None:
    """Return the terms that adapters add to an output product; None if no adapter has any.

    Like the product, the terms are partial sums over this shard's rows of w_out.

    Args:
      y: Factor of the output product.
      w: This shard's weights.
    """
    total, first = None, 0
    for part in self.out_parts:
      columns, first = y[..., first : first + part.width], first + part.width
      fields = self._output_fields(w, part)
      if fields is not None:
        a, b, owners = fields
        term = int8.matmul(self._own(int8.matmul(columns, a), owners), b)
        total = term if total is None else total + term
    return total

  def gathered_output_terms(
    self, columns: Sequence[Float[Array, 'b t _']], w: BlockPartWeights, embed: Axes, hidden: Axes
  ) -> Float[Array, 'b t E'] | None:
    """Return the terms of an output product by gathered matrices; see gathered_input_terms."""
    total = None
    for part, x in zip(self.out_parts, columns, strict=True):
      fields = self._output_fields(w, part)
      if fields is not None:
        a, b, owners = fields
        inner = self._own(int8.matmul(x, ops.all_gather(a, hidden, 0)), owners)
        term = int8.matmul(inner, ops.all_gather(b, embed, 1))
        total = term if total is None else total + term
    return total

  def _own(self, inner: Float[Array, 'b t c'], owners: Int[Array, ' c']) -> Float[Array, 'b t c']:
    """Keep each row's own inner products; those of other adapters become zeros."""
    own = self.rows[:, None, None] == owners[None, None, :]
    return jnp.where(own, inner, jnp.zeros((), inner.dtype))

  def _parts(self, w: BlockPartWeights, columns: slice) -> tuple[list[PackedPart], slice | None]:
    """Return the parts within some columns, and their range of ranks; None if it is empty."""
    found: list[PackedPart] = []
    ranks: list[int] = []
    offset = rank = 0
    begin, end, _ = columns.indices(sum(part.width for part in self.parts))
    for part in self.parts:
      b = w.adapters.get(f'in_b/{part.names[0]}')
      width = 0 if b is None else b.shape[0]
      if begin <= offset < end:
        found.append(part)
        ranks += range(rank, rank + width)
      offset, rank = offset + part.width, rank + width
    return found, slice(ranks[0], ranks[-1] + 1) if ranks else None

  def _output_fields(
    self, w: BlockPartWeights, part: PackedPart
  ) -> tuple[jax.Array, jax.Array, jax.Array] | None:
    names = (f'{field}/{part.names[0]}' for field in ('out_a', 'out_b', 'out_owners'))
    found = [w.adapters[name] for name in names if name in w.adapters]
    return (found[0], found[1], found[2]) if found else None


def with_terms(y: Float[Array, '*s'], terms: Float[Array, '*s'] | None) -> Float[Array, '*s']:
  """Add low-rank terms, if there are any, to a product."""
  return y if terms is None else y + terms


def scaled_heads(
  x: Float[Array, 'b t heads q'], factors: Float[Array, 'n heads q'], rows: Int[Array, ' b']
) -> Float[Array, 'b t heads q']:
  """Multiply queries, keys or values by the factors of each row's adapter, in float32."""
  own = jnp.take(factors, rows, axis=0)
  return (x.astype(jnp.float32) * own[:, None]).astype(x.dtype)


def scaled_columns(
  y: Float[Array, 'b t f'], factors: Float[Array, 'n columns'], rows: Int[Array, ' b']
) -> Float[Array, 'b t f']:
  """Multiply the MLP's columns by the factors of each row's adapter, in float32.

  Columns beyond the factors are spare room, whose values are ignored.
  """
  own = jnp.take(factors, rows, axis=0)
  own = jnp.pad(own, ((0, 0), (0, y.shape[-1] - own.shape[1])))
  return (y.astype(jnp.float32) * own[:, None]).astype(y.dtype)


def head_factors(adapters: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  """Return the factors of queries, keys and values, by name, as far as adapters have them."""
  names = {name: f'{SCALING}{name}' for name in _SCALED_HEADS}
  return {name: adapters[field] for name, field in names.items() if field in adapters}
