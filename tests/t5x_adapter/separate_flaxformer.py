"""Decoders of flaxformer's DecoderLayer, serial or parallel."""

from flax import linen as nn
from flaxformer.architectures.t5 import t5_architecture
from flaxformer.components import dense, embedding, layer_norm, relative_position_biases
from flaxformer.components.attention import dense_attention
import jax.numpy as jnp


class LayerNorm(nn.LayerNorm):
  """flax's, called as flaxformer calls norms."""

  def __call__(self, x, decode=False, prefill=False, prefill_lengths=None):
    del decode, prefill, prefill_lengths
    return super().__call__(x)


def make_module(
  vocab: int,
  layers: int,
  embed: int,
  ff: int,
  heads: int,
  head_dim: int,
  *,
  multiquery: bool = False,
  activations: tuple[str, ...] = ('gelu',),
  norm: str = 'layer',
  split: bool = False,
  fuse: str | None = None,
  fuse_mlp: bool = False,
  parallel: bool = False,
  rescale_logits: bool = True,
  scan_axis: int | None = 1,
  relative: bool = False,
  tied: bool = True,
) -> nn.Module:
  """A module that T5X's DecoderOnlyModel drives.

  Args:
    vocab, layers, embed, ff, heads, head_dim: sizes.
    multiquery: else multihead.
    activations: of the MLP.
    norm: 'layer', 'rms' (scales around one) or 'rms around zero'.
    split, fuse, fuse_mlp: split_head_kernel, kernels_to_fuse and the MLP's fuse_kernels.
    parallel: DecoderLayer's.
    rescale_logits: of attention.
    scan_axis: where layers are stacked; None makes a subtree a layer.
    relative: T5's relative bias instead of rotary positions.
    tied: whether the head is the embedding.
  """
  kernels = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
  scan = scan_axis is not None

  def dropout():
    return nn.Dropout(rate=0.0, broadcast_dims=(-2,))

  def make_norm():
    if norm == 'layer':
      return LayerNorm()
    return layer_norm.T5LayerNorm(center_scale_at_zero=norm == 'rms around zero')

  def bias():
    return relative_position_biases.RelativePositionBiases(
      num_buckets=32,
      max_distance=128,
      num_heads=heads,
      dtype=jnp.float32,
      embedding_init=nn.initializers.normal(stddev=1.0),
    )

  def head():
    axes = ('embed', 'vocab')
    return dense.DenseGeneral(vocab, use_bias=False, kernel_init=kernels, kernel_axis_names=axes)

  def layer(shared_relative_position_bias):
    attention = dict(
      num_heads=heads,
      head_dim=head_dim,
      qkv_features=heads * head_dim,
      out_features=embed,
      kernel_init=kernels,
      dropout_rate=0.0,
      rescale_logits=rescale_logits,
      use_rotary_embedding=not relative,
      use_bias=False,
      split_head_kernel=split,
    )
    if multiquery:
      self_attention = dense_attention.MultiQueryDotProductAttention(**attention)
    else:
      self_attention = dense_attention.MultiHeadDotProductAttention(
        **attention, kernels_to_fuse=fuse
      )
    mlp = dense.MlpBlock(
      intermediate_dim=ff,
      activations=activations,
      kernel_init=kernels,
      intermediate_dropout_rate=0.0,
      final_dropout_rate=0.0,
      use_bias=False,
      fuse_kernels=fuse_mlp,
    )
    return t5_architecture.DecoderLayer(
      self_attention=self_attention,
      encoder_decoder_attention=None,
      mlp=mlp,
      dropout_factory=dropout,
      layer_norm_factory=make_norm,
      parallel=parallel,
      scanned=scan,
      shared_relative_position_bias=shared_relative_position_bias,
    )

  def embedder():
    return embedding.Embed(
      num_embeddings=vocab,
      features=embed,
      cast_input_dtype=jnp.int32,
      attend_dtype=jnp.float32,
      embedding_init=nn.initializers.normal(stddev=1.0),
      one_hot=True,
      name='token_embedder',
    )

  def decoder(shared_token_embedder):
    del shared_token_embedder
    return t5_architecture.Decoder(
      num_layers=layers,
      token_embedder_factory=embedder,
      layer_factory=layer,
      dropout_factory=dropout,
      layer_norm_factory=make_norm,
      scan_layers=scan,
      scan_axis=scan_axis if scan else 1,
      shared_relative_position_bias_factory=bias if relative else None,
      output_logits_factory=None if tied else head,
    )

  return t5_architecture.DecoderOnly(decoder_factory=decoder, scan_layers=scan)
