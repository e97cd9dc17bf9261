"""Traffic between the phases: collectives that move a prefill's keys and values to the decode layout."""

from collections.abc import Mapping
import math

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.sharding.activations import ActivationSharding
from t5x_inference_ext.sharding.collective import Collective
from t5x_inference_ext.sharding.layout import Axes, num_shards


def cache_collectives(
  config: ModelConfig,
  prefill: ActivationSharding,
  decode: ActivationSharding,
  mesh: Mapping[str, int],
  batch: int,
  length: int,
  position_bytes: float,
) -> list[Collective]:
  """Return the collectives that bring one layer's keys and values into the decode layout.

  ShardedModel.kv_to_decode runs them. An axis that splits heads in prefill and rows in decode is an
  all-to-all, and one that splits heads or rows in prefill alone a gather. An axis that splits in
  decode alone moves nothing: each device keeps its part.

  Args:
    config: The model.
    prefill: Sharding of the prefill.
    decode: Sharding of the decode steps that follow.
    mesh: Axis name -> size.
    batch: B, the rows of both.
    length: Positions that are kept.
    position_bytes: Bytes of one position of one key head: d_head elements, and an int8 scale.
  """
  held, wanted = prefill.heads.cached(), decode.heads.cached()

  def used(axes: Axes) -> Axes:
    return tuple(a for a in axes if mesh[a] > 1)

  rows, to_rows = used(prefill.attention_rows), used(decode.attention_rows)
  heads = used(prefill.axes['kv_heads'])
  # Heads that differ between the phases are taken from all heads of a device's rows.
  to_heads = used(decode.axes['kv_heads']) if held == wanted else ()
  layer = 2 * batch * len(held) * length * position_bytes

  found: list[Collective] = []
  shards = num_shards(rows + heads, mesh)

  def add(kind: str, axes: Axes) -> None:
    nonlocal shards
    if not axes:
      return
    size = num_shards(axes, mesh)
    if kind == 'all_gather':
      shards //= size
    found.append(Collective('cache', kind, axes, size, math.ceil(layer / shards)))

  # Slices come first, so that the least moves.
  shards *= num_shards(tuple(a for a in to_rows + to_heads if a not in rows + heads), mesh)
  add('all_to_all', tuple(a for a in heads if a in to_rows))
  add('all_to_all', tuple(a for a in rows if a in to_heads))
  add('all_gather', tuple(a for a in heads if a not in to_rows + to_heads))
  add('all_gather', tuple(a for a in rows if a not in to_rows + to_heads))
  return found
