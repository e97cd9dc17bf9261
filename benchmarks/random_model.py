"""A model with random weights on one device, for benchmarks without a checkpoint."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.programs import generation_program
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.saved_generation import GenerationShape
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.program import abstract_weights, phase_function
from t5x_inference_ext.sharding.mesh import make_mesh

GREEDY = SamplingParams()
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Programs:
  """Functions to time for one batch size. They take no arguments; their first call compiles.

  Attributes:
    prefill: function. Runs whole prompts [B, T]; returns next tokens [B], and the cache.
    decode: function. Runs `steps` greedy decode steps, in a loop on the device; returns the last
      tokens [B].
    generate: function. Runs what the infer command runs for a batch; returns tokens
      [B, new tokens].
    steps: int. Number of decode steps in a call of `decode`.
  """

  prefill: object
  decode: object
  generate: object
  steps: int


@dataclasses.dataclass(frozen=True)
class RandomModel:
  """A model and its weights, bfloat16 or int8; activations and cache are bfloat16."""

  model: Model
  weights: Weights
  kind: str

  @classmethod
  def make(cls, config: ModelConfig, kind: str, scan_layers: bool) -> 'RandomModel':
    """Make a model.

    Args:
      config: ModelConfig. Its shape.
      kind: str. 'bfloat16' or 'int8' weights.
      scan_layers: bool. Whether to loop over all layers; otherwise they are unrolled.
    """
    model = Model(config, make_mesh((1, 1, 1)))
    return cls(model, random_weights(model, kind, scan_layers), kind)

  @property
  def weight_bytes(self) -> int:
    """Bytes of the weights. A decode step reads each once; the embedding, for the logits."""
    return sum(x.nbytes for x in jax.tree.leaves(self.weights))

  def programs(self, batch: int, prompt: int, new_tokens: int) -> Programs:
    """Return the programs for rows that all generate the same number of tokens.

    Args:
      batch: int. Rows.
      prompt: int. Tokens of each prompt, BOS included.
      new_tokens: int. Tokens to generate, at least 2.
    """
    # Whole blocks of positions: on a GPU, XLA would pad, and so copy, a cache of another length in
    # every step, for attention's products.
    config, context = self.model.config, -(-(prompt + new_tokens - 1) // _BLOCK) * _BLOCK
    case = CompileCase(
      config, self.kind, 'prefill', batch, context, prompt=prompt, scan_layers=self.weights.stacked
    )
    prefill, _ = phase_function(case, self.model.mesh)
    tokens = (
      np.random.default_rng(0).integers(2, config.vocab_size, (batch, prompt)).astype(np.int32)
    )
    tokens, lengths = jax.device_put((tokens, np.full(batch, prompt, np.int32)))
    run = GenerationShape(batch, prompt - 1, context, new_tokens, GREEDY, eos_id=-1)
    generate, _ = generation_program(self.model, run, self.weights)
    seeds = jnp.zeros(batch, jnp.uint32)
    return Programs(
      prefill=lambda: prefill(self.weights, tokens, lengths),
      decode=_DecodeLoop(self, new_tokens - 1, lambda: prefill(self.weights, tokens, lengths)),
      generate=lambda: generate(self.weights, tokens, lengths, seeds).tokens,
      steps=new_tokens - 1,
    )


class _DecodeLoop:
  """Decode steps after a prefill. Each call starts again after the prompts, in the same cache."""

  def __init__(self, owner: RandomModel, steps: int, prefill):
    self._prefill, self._state, self._weights = prefill, None, owner.weights
    model = owner.model

    def run(weights, cache, tokens):
      lengths = cache.lengths

      def step(_, state):
        cache, tokens = state
        logits, cache = model.decode_step(weights, cache, tokens)
        return cache, jnp.argmax(logits, axis=-1).astype(jnp.int32)

      cache, last = jax.lax.fori_loop(0, steps, step, (cache, tokens))
      return dataclasses.replace(cache, lengths=lengths), tokens, last

    self._run = jax.jit(run, donate_argnames='cache')

  def __call__(self) -> jax.Array:
    if self._state is None:
      tokens, cache = self._prefill()
      self._state = cache, tokens
    cache, tokens, last = self._run(self._weights, *self._state)
    self._state = cache, tokens
    return last


def random_weights(model: Model, kind: str, scan_layers: bool) -> Weights:
  """Make weights that keep activations near 1, on the device; stacked ones layer by layer."""
  shapes = abstract_weights(model, kind, scan_layers)
  leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
  made = []
  for n, (path, x) in enumerate(leaves):
    name = path[-1].name
    layered = scan_layers and 'layers' in [getattr(p, 'name', None) for p in path]
    layers, shape = (x.shape[0], x.shape[1:]) if layered else (0, x.shape)
    make = _maker(name, shape, x.dtype, model.config.d_model, layers, x.sharding)
    made.append(make(jax.random.key(n)))
  return jax.tree.unflatten(tree, made)


@functools.cache
def _maker(name, shape, dtype, d_model, layers, sharding):
  """Return a jitted function of a random key that makes an array, of one layer or of all layers."""
  if name.endswith('_scale'):  # of int8 weights, whose standard deviation is 73
    one = lambda key: jnp.full(shape, 1 / (73 * math.sqrt(d_model)), dtype)
  elif name.endswith('norm'):
    one = lambda key: jnp.ones(shape, dtype)
  elif name.endswith('_bias'):
    one = lambda key: jnp.zeros(shape, dtype)
  elif dtype == jnp.int8:
    one = lambda key: jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint8), jnp.int8)
  else:
    # A small embedding: a large tied one would repeat the last token, whatever the layers compute.
    size = 0.1 if name == 'embedding' else 1 / math.sqrt(shape[0])
    one = lambda key: (size * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)
  make = (lambda key: jax.lax.map(one, jax.random.split(key, layers))) if layers else one
  return jax.jit(make, out_shardings=sharding)
