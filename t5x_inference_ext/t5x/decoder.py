"""T5X's DecoderOnlyModel, with prefill, decode steps and scores of this package on a mesh."""

from collections.abc import Callable, Mapping, MutableMapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import seqio
from t5x import decoding, models

from t5x_inference_ext.compiler_options import compiler_options
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.cache import with_heads
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.quantization.formats import weight_format
from t5x_inference_ext.t5x.cache import cache_from_t5x, cache_to_t5x
from t5x_inference_ext.t5x.module import InferenceModule, weights_from_params
from t5x_inference_ext.t5x.types import Array, Batch, Cache, DecodeFn, Params, Predictions


class ShardedDecoder(models.DecoderOnlyModel):
  """Implements T5X's predict and score methods with a Model's prefill, decode steps and logits.

  Any batch size runs on any mesh: a batch is padded with copies of its last row, whose results are
  dropped.

  Args:
    module: Declares the parameters. Its `model` runs the passes.
    vocabulary: Vocabulary of inputs and targets.
    decode_fn: T5X's loop over decode steps.
    inputs_length: Number of positions that prefill processes; None: the length of the sequence.
    bos_id: Token in front of each prompt, where T5X's batches always have 0; None: none.
    feature_converter_cls: See T5X.
  """

  def __init__(
    self,
    module: InferenceModule,
    vocabulary: seqio.Vocabulary,
    decode_fn: DecodeFn,
    inputs_length: int | None,
    bos_id: int | None,
    feature_converter_cls: Callable[..., seqio.FeatureConverter] | None,
  ) -> None:
    self.model: Model = module.model
    self._inputs_length, self._bos_id = inputs_length, bos_id
    scaled = weight_format(module.weights).scaled
    options = compiler_options(self.model.mesh.devices.flat[0], scaled)
    self._jitted_scores = jax.jit(self._scores, compiler_options=options)
    super().__init__(
      module,
      vocabulary,
      optimizer_def=None,
      decode_fn=functools.partial(self._decode, decode_fn),
      feature_converter_cls=feature_converter_cls,
    )

  def predict_batch_with_aux(
    self,
    params: Params,
    batch: Batch,
    rng: jax.Array | None = None,
    *,
    return_all_decodes: bool = False,
    num_decodes: int = 1,
    decoder_params: MutableMapping[str, Any] | None = None,
  ) -> Predictions:
    """Return predictions without their prompts, and their scores, like T5X's method.

    Args:
      params: The parameters.
      batch: `decoder_input_tokens` [B, L] int32, BOS and the prompt, then 0; and
        `decoder_causal_attention` [B, L], 1 at BOS and the prompt.
      rng: Random key of the samples.
      return_all_decodes: Whether to return all samples of a prompt, or only the best one.
      num_decodes: Number of samples, or beams, of each prompt.
      decoder_params: Further arguments of decode_fn.

    Returns:
      Tokens [B, L] int32, padded with 0 on the right, and {'scores': [B] float32}. All samples are
      [B, num_decodes, L] and [B, num_decodes], from the worst to the best.
    """
    rows = batch['decoder_input_tokens'].shape[0]
    # Decoding runs B * num_decodes rows: the mesh must divide this number too.
    size = self._padded_batch(rows, num_decodes)
    if decoder_params is not None:  # options may be per row, such as temperatures
      decoder_params = {
        k: _pad_rows(v, size) if k != 'decode_rng' and getattr(v, 'shape', ())[:1] == (rows,) else v
        for k, v in decoder_params.items()
      }
    tokens, aux = super().predict_batch_with_aux(
      params,
      {k: _pad_rows(v, size) for k, v in batch.items()},
      rng,
      return_all_decodes=return_all_decodes,
      num_decodes=num_decodes,
      decoder_params=decoder_params,
    )
    return tokens[:rows], jax.tree.map(lambda x: x[:rows], aux)

  def score_batch(
    self, params: Params, batch: Batch, return_intermediates: bool = False
  ) -> jax.Array | tuple[jax.Array, Mapping[str, Any]]:
    """Return each row's sum of weight * log p(target) over positions, [B] float32.

    With return_intermediates, also return T5X's dict of intermediates: targets, their weights, and
    each token's log-probability.
    """
    self._check(batch)
    tokens, targets, weights = (
      batch[f'decoder_{k}'] for k in ('input_tokens', 'target_tokens', 'loss_weights')
    )
    compute = self._jitted_scores if is_concrete(params, batch) else self._scores
    scores = compute(params, tokens, targets) * weights
    if not return_intermediates:
      return scores.sum(-1)
    intermediates = {
      'target_tokens': (targets,),
      'loss_weights': (weights,),
      'token_scores': (scores,),
    }
    return scores.sum(-1), {'decoder': intermediates}

  def _scores(self, params: Params, tokens: Array, targets: Array) -> jax.Array:
    """Return log p(target) at each position, [B, L] float32.

    In a model without BOS, nothing predicts the first target: its entry is 0.
    """
    rows = tokens.shape[0]
    size = self._padded_batch(rows)
    inputs, skipped = self._model_inputs(_pad_rows(tokens, size))
    scores = self.model.log_probs(
      weights_from_params(params), inputs, _pad_rows(targets, size)[:, skipped:]
    )
    return jnp.pad(scores[:rows], ((0, 0), (skipped, 0)))

  def _model_inputs(self, tokens: jax.Array) -> tuple[jax.Array, int]:
    """Return (T5X's inputs [B, L] as model inputs, number of columns dropped).

    Column 0 of T5X's inputs, id 0, is replaced by the model's BOS, or dropped if there is none.
    """
    if self._bos_id is None:
      return tokens[:, 1:], 1
    return (tokens if self._bos_id == 0 else tokens.at[:, 0].set(self._bos_id)), 0

  def _compute_logits(
    self,
    params: Params,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
    mutable: Any = False,
    other_variables: Any = None,
  ) -> jax.Array:
    """Return logits [B, L, V] float32 at all positions; zeros at position 0 without BOS."""
    del dropout_rng, mutable, other_variables  # unused: nothing here is random or mutable
    self._check(batch)
    tokens = batch['decoder_input_tokens']
    padded = _pad_rows(tokens, self._padded_batch(tokens.shape[0]))
    inputs, skipped = self._model_inputs(padded)
    logits = self.model.logits(weights_from_params(params), inputs)[: tokens.shape[0]]
    return jnp.pad(logits, ((0, 0), (skipped, 0), (0, 0)))

  def _compute_kv_cache(
    self, params: Params, inputs: jax.Array, causal_attention_mask: jax.Array
  ) -> tuple[Cache, jax.Array]:
    """Prefill all but the last token of each prompt, which T5X feeds to the first decode step.

    Args:
      params: The parameters.
      inputs: [B, L] int32, BOS and the prompt, then 0. The mesh must divide B.
      causal_attention_mask: [B, L], 1 at BOS and the prompt. Prompt lengths are computed from this
        mask, not from ids, so that an id 0 in a prompt does not end it.

    Returns:
      The cache, and the position [B] of each prompt's last token; 0, the position of BOS, for an
      empty prompt.
    """
    last = jnp.maximum(jnp.sum(causal_attention_mask != 0, axis=-1).astype(jnp.int32) - 1, 0)
    # Prefill reads BOS and the prompt without its last token: as many positions as the prompt has
    # tokens.
    size = inputs.shape[1] if self._inputs_length is None else max(self._inputs_length, 1)
    tokens, skipped = self._model_inputs(inputs)
    cached = jnp.maximum(last - skipped, 0)
    _, cache = self.model.prefill(
      weights_from_params(params), tokens[:, :size], jnp.maximum(cached, 1), inputs.shape[1]
    )
    return cache_to_t5x(dataclasses.replace(cache, lengths=cached)), last

  def _compute_logits_from_slice(
    self, decoding_state: decoding.DecodingState, params: Params, max_decode_length: int
  ) -> tuple[jax.Array, Cache]:
    """Run one token of each row; return logits [B, V] float32, and the cache with the token.

    The cache's lengths give the tokens' positions.
    """
    del max_decode_length
    held, tokens = cache_from_t5x(decoding_state.cache), decoding_state.cur_token[:, 0]
    if self._bos_id:  # for an empty prompt, T5X passes id 0 instead of BOS
      tokens = jnp.where(held.lengths == 0, self._bos_id, tokens)
    logits, cache = self.model.decode_step(weights_from_params(params), held, tokens)
    return logits, cache_to_t5x(cache)

  def _decode(
    self, decode_fn: DecodeFn, *, inputs: jax.Array, cache: Cache, num_decodes: int, **kwargs: Any
  ) -> tuple[jax.Array, jax.Array]:
    """Return a decode_fn for num_decodes samples (or beams) of each prompt.

    Prefill returns a cache for decode steps of B rows, and decode_fn repeats each row num_decodes
    times. B rows may be split over fewer devices than B * num_decodes rows, and then heads are
    split over the others. The cache's number of heads, with padding and copies, depends on this
    split. So the cache is first converted to the heads of the decode steps. When decode_fn repeats
    the rows, they are resharded, and then stay: all steps of its loop have one sharding.
    """
    rows = inputs.shape[0]
    held, wanted = (self.model.decode_sharding(rows * n).heads.cached() for n in (1, num_decodes))
    if held != wanted:
      kv = cache_from_t5x(cache)
      keys, values = jax.tree.map(lambda x: with_heads(x, held, wanted), (kv.keys, kv.values))
      cache = cache_to_t5x(dataclasses.replace(kv, keys=keys, values=values))
    return decode_fn(inputs=inputs, cache=cache, num_decodes=num_decodes, **kwargs)

  def _padded_batch(self, rows: int, copies: int = 1) -> int:
    """Return the smallest batch >= `rows` that the mesh divides, as does `copies` times the batch.

    On one device, `rows` is returned without a comparison, because it may be a symbolic dimension
    of jax.export, which can't be compared.
    """
    if self.model.mesh.size == 1:
      return rows
    while True:
      rows = self.model.padded_batch(rows)
      if self.model.padded_batch(rows * copies) == rows * copies:
        return rows
      rows += 1

  def _check(self, batch: Batch) -> None:
    if 'decoder_segment_ids' in batch:
      raise RequestError('packed examples are not supported: set DatasetConfig.pack = False')


def _pad_rows(x: Array, rows: int) -> jax.Array:
  """Return x [B, ...] padded to [rows, ...] with copies of its last row.

  A copy ends with its original row, so padding never makes decoding longer.
  """
  return jnp.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1), mode='edge')


def is_concrete(*trees: Any) -> bool:
  """Return whether all leaves are arrays with values, rather than jax's tracers."""
  return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees))
