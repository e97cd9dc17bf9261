"""Attention whose cached part is computed by a Pallas kernel, and what the kernel asks of a model.

Shapes are per shard, with the letters of model.attention.
"""

import dataclasses

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float, Int

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.hardware import LANES
from t5x_inference_ext.model.attention import (
  Context,
  grouped_queries,
  largest_logits,
  masked_logits,
  ungrouped,
  with_segments,
)
from t5x_inference_ext.model.paged_attention import PagedContext, shared_segment
from t5x_inference_ext.quantization.kv import KV

ATTENTION_KINDS = ('xla', 'kernel')
AnyMesh = Mesh | AbstractMesh


def check_attention(kind: str, config: ModelConfig, mesh: AnyMesh) -> None:
  """Raise RequestError unless a model's attention to its cache can be of `kind` on a mesh."""
  if kind not in ATTENTION_KINDS:
    raise RequestError(f'attention must be one of {", ".join(ATTENTION_KINDS)}, got {kind!r}')
  if kind == 'xla':
    return
  platform = _platform(mesh)
  reason = None
  if platform not in ('tpu', 'cpu'):
    reason = f'TPUs, and these devices are {platform}s'
  elif config.has_attention_rules:
    reason = 'models without position biases, windows and soft caps of attention'
  elif platform == 'tpu' and config.d_head % LANES:
    reason = f'heads of a multiple of {LANES} dimensions, and these have {config.d_head}'
  if reason:
    raise RequestError(f"attention='kernel' is for {reason}: use attention='xla'")


def attention_kernel(kind: str, mesh: AnyMesh) -> 'AttentionKernel | None':
  """Return the kernel of a model's attention to its cache; None for plain JAX."""
  return None if kind == 'xla' else AttentionKernel(interpret=_platform(mesh) == 'cpu')


def _platform(mesh: AnyMesh) -> str:
  return mesh.devices.flat[0].platform if isinstance(mesh, Mesh) else 'cpu'


@dataclasses.dataclass(frozen=True)
class AttentionKernel:
  """Attention whose cached part is computed by kernels.context_attention.

  Attributes:
    interpret: Whether JAX's interpreter runs the kernel, as on CPU devices.
  """

  interpret: bool

  def attend(
    self,
    q: Float[Array, 'b m h q'],
    k: KV,
    v: KV,
    context: Context | PagedContext,
    first_query: Int[Array, ''] | int = 0,
  ) -> Float[Array, 'b m h q']:
    """Attend from each new token to its row's context, and to the new tokens up to itself.

    A row whose logits are not finite gets NaN; other rows are not affected.

    Args:
      q: [b, m, h, q]. Queries, rotated, not yet scaled.
      k: [b, k, t, q]. Rotated keys of the new tokens, rounded to the cache's precision.
      v: [b, k, t, q]. Values, rounded to the cache's precision.
      context: Keys and values cached before these tokens.
      first_query: Index of the shard's first query among the t new tokens.
    """
    # Imported here: Pallas takes a second to import, and brings absl's flags.
    from t5x_inference_ext.kernels.context_attention import (
      attend_to_context,
      page_blocks,
      row_blocks,
    )

    grouped, causal = grouped_queries(q, k.shape[2], k.shape[1], first_query)
    segments = [(masked_logits(grouped, k, causal), v)]
    keys, values = context.keys, context.values
    if isinstance(context, PagedContext):
      if context.shared_keys is not None:
        segments.append(shared_segment(grouped, context))
      blocks = page_blocks(context.owners, context.starts, keys.shape[2])
    else:
      blocks = row_blocks(len(q), keys.shape[2])
    out, context_largest, total = attend_to_context(
      grouped, keys, values, context.lengths, blocks, self.interpret
    )
    largest = largest_logits(context_largest, segments)  # finite: a new token sees itself
    rescale = jnp.exp(context_largest - largest)
    out, total = out * rescale[..., None], total * rescale
    return ungrouped(with_segments(out, total, largest, segments, q.dtype), q)
