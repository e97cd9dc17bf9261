"""The stock side of a comparison: the model of the test checkpoints, of flaxformer's own parts.

PaLM-style: parallel block, multiquery attention, rotary positions, SwiGLU, RMS norm with scales
around zero, tied embedding.
"""

from flax import linen as nn
from flaxformer.architectures.t5 import parallel_fused_decoder, t5_architecture
from flaxformer.components import dense, embedding, layer_norm
from flaxformer.components.attention import dense_attention
import jax.numpy as jnp
import seqio
from t5x import models


def make_module(
  vocab: int,
  layers: int,
  embed: int,
  ff: int,
  heads: int,
  head_dim: int,
  scan: bool = True,
  dtype=jnp.float32,
  activations: tuple[str, ...] = ('swish', 'linear'),
  quantized: bool = False,
) -> nn.Module:
  """A module that T5X's DecoderOnlyModel drives unchanged; (384, 4, 256, 1024, 8, 32) is palm_tiny.

  With `quantized`, its kernels are flaxformer's quantized variables, qkernel and qscale.
  """
  aqt = {}
  if quantized:
    from aqt.jax_legacy.jax import quantization

    weights = quantization.QuantOps.WeightParams(prec=8, half_shift=False, axis=None)
    aqt = dict(use_aqt=True, weight_params=weights, possibly_use_quantized_vars=True)
  kernels = nn.initializers.variance_scaling(1.0, 'fan_in', 'normal')
  no_bias = dict(use_bias=False, bias_init=nn.initializers.zeros)

  def dropout():
    return nn.Dropout(rate=0.0, broadcast_dims=(-2,))

  def norm():
    return layer_norm.T5LayerNorm(dtype=dtype, center_scale_at_zero=True)

  def layer(shared_relative_position_bias):
    del shared_relative_position_bias
    attention = dense_attention.MultiQueryDotProductAttention(
      num_heads=heads,
      dtype=dtype,
      head_dim=head_dim,
      qkv_features=heads * head_dim,
      out_features=embed,
      kernel_init=kernels,
      broadcast_dropout=True,
      dropout_rate=0.0,
      rescale_logits=True,
      float32_logits=True,
      use_rotary_embedding=True,
      **no_bias,
    )
    mlp = dense.MlpBlock(
      intermediate_dim=ff,
      out_dim=embed,
      precomputed_intermediates=True,
      fuse_kernels=False,
      activations=activations,
      kernel_init=kernels,
      intermediate_dropout_rate=0.0,
      final_dropout_rate=0.0,
      dtype=dtype,
      **no_bias,
    )
    return parallel_fused_decoder.ParallelFusedDecoderLayer(
      self_attention=attention,
      mlp=mlp,
      dropout_factory=dropout,
      layer_norm_factory=norm,
      scanned=scan,
      **aqt,
    )

  def embedder():
    return embedding.Embed(
      num_embeddings=vocab,
      features=embed,
      cast_input_dtype=jnp.int32,
      dtype=dtype,
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
      layer_norm_factory=norm,
      dtype=dtype,
      scan_layers=scan,
      scan_axis=1,
      layer_remat='minimal' if scan else 'legacy',
    )

  return t5_architecture.DecoderOnly(decoder_factory=decoder, scan_layers=scan, dtype=dtype)


def stock_model(config, dtype=jnp.float32, **options) -> models.DecoderOnlyModel:
  """T5X's model of a PaLM of these sizes, over bytes."""
  c = config
  module = make_module(
    c.vocab_size, c.num_layers, c.d_model, c.d_ff, c.num_heads, c.d_head, dtype=dtype
  )
  return models.DecoderOnlyModel(module, seqio.ByteVocabulary(), optimizer_def=None, **options)
