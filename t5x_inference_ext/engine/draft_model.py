"""Drafts that a second, smaller model samples, with the noise that the rows' own sampling uses.

A sample is the token with the largest logit + noise. The noise depends only on the row's seed, the
position and the token. With equal noise, the smaller model can predict the token that the row will
sample, not only its most likely token.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from t5x_inference_ext.checkpoints import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.load import load_weights, scans_layers
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.drafting import DraftInputs, Outlook
from t5x_inference_ext.engine.row_choice import draw_tokens
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.chunks import constrain_cache, empty_cache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.layout import check_model

# Tokens of each row in a pass that fills gaps of the draft model's cache from the row's tokens.
CATCH_UP_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class DraftModel:
  """Drafts with a second model, whose cache is kept in step with the rows' tokens.

  The drafter's own state is the draft model's cache. Before a draft is made, the tokens of a row
  that the cache lacks are run through the draft model.

  Attributes:
    model: The draft model, on the mesh of the model that it drafts for.
    most: K, the maximum number of tokens of a draft.
    expected: See drafting.Drafter.
    shared_noise: Whether drafts are sampled with the noise of the rows' own sampling; without it, a
      draft consists of the most likely tokens.
  """

  model: Model
  most: int
  expected: tuple[float, ...] = (0.6,)
  shared_noise: bool = True

  def start(self, weights: Weights, rows: int, size: int) -> KVCache:
    """Return an empty cache of `size` positions a row, or CATCH_UP_TOKENS if that is more."""
    return empty_cache(self.model, weights, rows, max(size, CATCH_UP_TOKENS))

  def enter(self, own: KVCache, slot: jax.Array) -> KVCache:
    """Empty the cache of the row in a slot."""
    lengths = jnp.where(jnp.arange(len(own.lengths)) == slot, 0, own.lengths)
    return dataclasses.replace(own, lengths=lengths)

  def placed(self, own: KVCache, weights: Weights) -> KVCache:
    """Return the cache in the sharding of the draft model."""
    return constrain_cache(self.model, own, weights)

  def outlook(self, tokens: Int[Array, 'B S'], last: Int[Array, ' B']) -> Outlook:
    """Return an Outlook in which every row can get a draft, of tokens that are not known yet."""
    nothing = jnp.zeros_like(last)
    return Outlook(nothing + self.most, nothing, nothing, nothing - 1)

  def draft(
    self, inputs: DraftInputs, outlook: Outlook, width: int
  ) -> tuple[KVCache, Int[Array, 'B K']]:
    """Return the cache, and the tokens that the draft model draws. See drafting.Drafter."""
    weights, last, live = inputs.weights, inputs.last, ~inputs.state.ended
    own = inputs.drafting.own
    # Drop the last draft's rejected tokens from the cache.
    own = dataclasses.replace(own, lengths=jnp.minimum(own.lengths, last))

    def behind(cache: KVCache) -> jax.Array:
      return jnp.any(live & (cache.lengths < last - 1))

    def catch_up(cache: KVCache) -> KVCache:
      counts = jnp.where(live, jnp.clip(last - cache.lengths, 0, CATCH_UP_TOKENS), 0)
      tokens = _next_tokens(inputs.drafting.tokens, cache.lengths, CATCH_UP_TOKENS)
      return self.model.prefill_chunk(weights, cache, tokens, counts)[1]

    own = lax.while_loop(behind, catch_up, own)
    # Run the last token, and the one before it too if the whole last draft was accepted.
    counts = jnp.where(live, last + 1 - own.lengths, 0)
    tokens = _next_tokens(inputs.drafting.tokens, own.lengths, 2)
    logits, own = self.model.prefill_chunk(weights, own, tokens, counts)
    found = [self._draw(inputs, logits, 0)]
    for step in range(1, width):
      logits, own = self.model.decode_step(weights, own, found[-1])
      found.append(self._draw(inputs, logits, step))
    return own, jnp.stack(found, axis=1)

  def _draw(self, inputs: DraftInputs, logits: Float[Array, 'B V'], step: int) -> Int[Array, ' B']:
    """Return token number `step` (from 0) of each row's draft.

    Penalties ignore the draft's own earlier tokens: the draft is only a guess.
    """
    if not self.shared_noise:
      return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return draw_tokens(inputs.rows, inputs.state, logits, inputs.last + 1 + step)


def _next_tokens(tokens: jax.Array, lengths: jax.Array, count: int) -> jax.Array:
  """Return [B, count]: the tokens of each row that follow its first `lengths` tokens."""
  at = lengths[:, None] + jnp.arange(count)[None, :]
  return jnp.take_along_axis(tokens, jnp.minimum(at, tokens.shape[1] - 1), axis=1)


def open_draft_model(path: str, config: ModelConfig, mesh: Mesh) -> Checkpoint:
  """Open a draft model's checkpoint, reading no weights.

  Args:
    path: A checkpoint of any format.
    config: The model that gets the drafts.
    mesh: The mesh of both models.

  Raises:
    UserError: The checkpoint can't be read, its vocabulary has another size, or the mesh does not
      divide the draft model.
  """
  checkpoint = open_checkpoint(path)
  if checkpoint.config.vocab_size != config.vocab_size:
    raise RequestError(
      f'the draft model {path} has a vocabulary of {checkpoint.config.vocab_size} tokens, and the '
      f'model one of {config.vocab_size}: give one with the same vocabulary'
    )
  check_model(checkpoint.config, mesh.shape)
  return checkpoint


def load_draft_model(path: str, model: Model) -> tuple[Model, Weights]:
  """Load a draft model onto the mesh of `model`, with the layouts and dtypes of `model`.

  Args:
    path: A checkpoint of any format.
    model: The model that gets the drafts.

  Raises:
    UserError: See open_draft_model; or a tensor is damaged.
  """
  checkpoint = open_draft_model(path, model.config, model.mesh)
  draft = dataclasses.replace(model, config=checkpoint.config)
  platform = model.mesh.devices.flat[0].platform
  stacked = scans_layers(checkpoint.config.num_layers, None, platform)
  return draft, load_weights(checkpoint, draft, stacked=stacked)
