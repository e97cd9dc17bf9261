"""T5X's DecoderOnlyModel over this package's model: prefill, decode steps and scores run per shard on the mesh."""

from collections.abc import Callable, Mapping, MutableMapping
import dataclasses
import functools
from typing import Any

from flax import core as flax_core
import jax
import jax.numpy as jnp
import seqio
from t5x import decoding, models, utils

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.load import scans_layers
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.inputs import EOS_ID
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.quantization.kv import KV, Int8KV
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import parse_mesh
from t5x_inference_ext.sharding.mesh_choice import choose_mesh
from t5x_inference_ext.t5x.module import STACK, InferenceModule, weights_from_params
from t5x_inference_ext.t5x.partitioning import inference_mesh
from t5x_inference_ext.t5x.refill import Predictor, Refill, is_concrete

Params = Mapping[str, Any]
Batch = Mapping[str, jax.Array]
Cache = dict[str, Any]


def task_vocabulary(dataset_cfg: utils.DatasetConfig) -> seqio.Vocabulary:
  """The vocabulary of a task's targets: of what the model writes."""
  return utils.get_vocabulary(dataset_cfg)[1]


class InferenceModel(models.DecoderOnlyModel):
  """A PaLM-style decoder for T5X's inference: t5x.infer, interactive_model and export.

  Any batch size runs on any mesh: predict and score methods pad with copies of the last row, and drop them after.

  Args:
    vocabulary: of inputs and targets.
    checkpoint: where the model's shape, and whether it is int8, are read from; no weights are. None needs a config.
    config: the model's shape, which the checkpoint must then have.
    int8: without a checkpoint, whether the matrices are int8.
    mesh: 'XxYxZ', over the first X*Y*Z devices; None takes as many devices as divide the model, along the
      torus of a TPU slice (sharding.mesh_choice.choose_mesh). Or a jax Mesh of axes x, y, z, whose devices need not be here:
      for precompiling (precompile.slices.slice_mesh).
    prefill_layout: 'feedforward/attention' of prompts and of scores; see sharding.layout.Layout.
    decode_layout: that of decode steps.
    dtype: of activations and float weights: 'float32' or 'bfloat16'.
    cache: what the KV cache holds: 'float32', 'bfloat16', 'int8' with a scale for each position and head, or None: dtype.
    norm_scale: 'zero' or 'one': how norm scales are stored, for a checkpoint that does not record it.
    scan_layers: one array for all layers and a loop in the program; by default for more than 8 on CPU, else never.
    decode_fn: decoding.temperature_sample, decoding.beam_search or another of their kind.
    task_feature_lengths: the task's, where its features are trimmed to them, as T5X's datasets are: prefill then runs
      over the length of inputs instead of that of inputs and targets.
    refill: predictions are made on the host, through decode slots that are kept full; decode_fn is then without effect.
      None: T5X's loop over a batch. See t5x.refill.
    feature_converter_cls: see T5X.
    inputs_bidirectional_attention: has to be False; here because stock configurations bind it.

  Raises:
    CheckpointError: no checkpoint there, or another model's.
    MeshError: a mesh that does not fit the devices or the model, or layouts that do not fit each other.
    RequestError: an option that is not supported.
  """

  def __init__(
    self,
    vocabulary: seqio.Vocabulary,
    checkpoint: str | None = None,
    config: ModelConfig | None = None,
    *,
    int8: bool = False,
    mesh: str | jax.sharding.Mesh | None = None,
    prefill_layout: str = 'ws_2d/batch',
    decode_layout: str = 'ws_2d/batch',
    dtype: str = 'bfloat16',
    cache: str | None = None,
    norm_scale: str | None = None,
    scan_layers: bool | None = None,
    decode_fn: models.DecodeFnCallable = decoding.temperature_sample,
    task_feature_lengths: Mapping[str, int] | None = None,
    refill: Refill | None = None,
    feature_converter_cls: Callable[..., seqio.FeatureConverter] | None = None,
    inputs_bidirectional_attention: bool = False,
  ):
    if inputs_bidirectional_attention:
      raise RequestError(
        'InferenceModel.inputs_bidirectional_attention: only causal attention is supported'
      )
    self.notes: tuple[str, ...] = ()  # what was found and assumed, for the log
    if checkpoint is not None:
      opened = open_checkpoint(checkpoint, norm_scale=norm_scale, config=config)
      config, int8 = opened.config, opened.weights == 'int8'
      self.notes = opened.notes
    elif config is None:
      raise RequestError(
        "InferenceModel needs a checkpoint to read the model's shape from, or a config"
      )
    elif norm_scale is not None:
      config = dataclasses.replace(config, norm_scale=norm_scale)
    if vocabulary.vocab_size > config.vocab_size:
      raise RequestError(
        f"the vocabulary has {vocabulary.vocab_size} ids and the model's embedding {config.vocab_size} rows: this "
        'is not the vocabulary that the model was trained with'
      )
    if not isinstance(mesh, jax.sharding.Mesh):
      mesh = choose_mesh(config, jax.devices()) if mesh is None else parse_mesh(mesh)
    self.model = Model(
      config,
      inference_mesh(mesh),
      Layout.parse(prefill_layout),
      Layout.parse(decode_layout),
      dtype,
      cache,
    )
    self._inputs_length = (task_feature_lengths or {}).get('inputs')
    self.refills = refill is not None
    self._predictor = (
      Predictor(self.model, refill, vocabulary.eos_id or EOS_ID, self._inputs_length)
      if refill
      else None
    )
    self._jitted_scores = jax.jit(self._scores)
    scan_layers = scans_layers(
      config.num_layers, scan_layers, self.model.mesh.devices.flat[0].platform
    )
    super().__init__(
      InferenceModule(self.model, int8, scan_layers),
      vocabulary,
      optimizer_def=None,
      decode_fn=functools.partial(self._decode, decode_fn),
      feature_converter_cls=feature_converter_cls,
    )

  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, Any],
    input_types: Mapping[str, Any] | None = None,
  ) -> Mapping[str, Any]:
    """The parameters, random, with their axes. T5X only asks for their shapes, unless there is no checkpoint."""
    del input_shapes, input_types
    return flax_core.freeze(self.module.init(rng))

  def predict_batch_with_aux(
    self,
    params: Params,
    batch: Batch,
    rng: jax.Array | None = None,
    *,
    return_all_decodes: bool = False,
    num_decodes: int = 1,
    decoder_params: MutableMapping[str, Any] | None = None,
  ) -> tuple[jax.Array, Mapping[str, jax.Array]]:
    """As T5X's: tokens [B, L] after the prompt, or [B, num_decodes, L] from the worst to the best, and their scores."""
    if self.refills and decoder_params is None and is_concrete(params, batch):
      return self._predictor(params, batch, rng, num_decodes, return_all_decodes)
    rows = batch['decoder_input_tokens'].shape[0]
    # Decoding runs B * num_decodes rows, which have to fill the mesh too.
    size = self._padded_batch(rows, num_decodes)
    if decoder_params is not None:  # per-row options, such as a temperature for each
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
    """As T5X's: [B] float32, the sum over positions of weight * log p(target).

    With return_intermediates also T5X's dict of them; the model itself has none to add.
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

  def _scores(self, params, tokens, targets):
    """log p(target) at each position, [B, L]."""
    rows = tokens.shape[0]
    size = self._padded_batch(rows)
    return self.model.log_probs(
      weights_from_params(params), _pad_rows(tokens, size), _pad_rows(targets, size)
    )[:rows]

  def _compute_logits(
    self,
    params: Params,
    batch: Batch,
    dropout_rng: jax.Array | None = None,
    mutable: Any = False,
    other_variables: Any = None,
  ) -> jax.Array:
    """Logits [B, L, V] float32 after each position."""
    del dropout_rng, mutable, other_variables  # nothing here is random or mutable
    self._check(batch)
    tokens = batch['decoder_input_tokens']
    padded = _pad_rows(tokens, self._padded_batch(tokens.shape[0]))
    return self.model.logits(weights_from_params(params), padded)[: tokens.shape[0]]

  def _compute_kv_cache(
    self, params: Params, inputs: jax.Array, causal_attention_mask: jax.Array
  ) -> tuple[Cache, jax.Array]:
    """Runs the prompts but for their last token, which T5X feeds to the first decode step.

    Args:
      params: the parameters.
      inputs: [B, L] int32, BOS and prompt, then 0; B has to fill the mesh.
      causal_attention_mask: [B, L], 1 where BOS and prompt are. Lengths come from here, not from the ids: an id 0 in a
        prompt does not shorten it.

    Returns:
      The cache, and the position [B] of the last token of each prompt (0, that of BOS, for an empty one).
    """
    last = jnp.maximum(jnp.sum(causal_attention_mask != 0, axis=-1).astype(jnp.int32) - 1, 0)
    # BOS and all but the last token of the prompt: as many positions as a prompt has tokens.
    prompts = (
      inputs[:, : max(self._inputs_length, 1)] if self._inputs_length is not None else inputs
    )
    _, cache = self.model.prefill(
      weights_from_params(params), prompts, jnp.maximum(last, 1), inputs.shape[1]
    )
    return self._to_t5x(dataclasses.replace(cache, lengths=last)), last

  def _compute_logits_from_slice(
    self, decoding_state: decoding.DecodingState, params: Params, max_decode_length: int
  ) -> tuple[jax.Array, Cache]:
    """One token a row: logits [B, V] float32 and the cache with it. Positions are the cache's own."""
    del max_decode_length
    cache = self._from_t5x(decoding_state.cache)
    logits, cache = self.model.decode_step(
      weights_from_params(params), cache, decoding_state.cur_token[:, 0]
    )
    return logits, self._to_t5x(cache)

  def _decode(
    self,
    decode_fn: models.DecodeFnCallable,
    *,
    inputs: jax.Array,
    cache: Cache,
    num_decodes: int,
    **kwargs,
  ) -> tuple[jax.Array, jax.Array]:
    """decode_fn, for num_decodes samples (or beams) of each prompt, on a cache with the heads that so many rows take.

    Prefill makes a cache for decode steps of B rows, and decode_fn repeats each row num_decodes times. B rows may be
    split over fewer devices than B * num_decodes, and heads over the others; how many heads the cache has, padding and
    copies included, depends on that. The rows themselves move as they are repeated, once: the decode step, and with it
    the loop, takes them in one sharding.
    """
    rows = inputs.shape[0]
    held, wanted = (self.model.decode_sharding(rows * n).heads.cached() for n in (1, num_decodes))
    if held != wanted:
      heads = jnp.asarray([0 if h is None else held.index(h) for h in wanted])
      kv = self._from_t5x(cache)
      keys, values = jax.tree.map(lambda x: jnp.take(x, heads, axis=-2), (kv.keys, kv.values))
      cache = self._to_t5x(dataclasses.replace(kv, keys=keys, values=values))
    return decode_fn(inputs=inputs, cache=cache, num_decodes=num_decodes, **kwargs)

  # T5X's decoding functions tile, flatten and reorder rows on one axis of every leaf: axis 1 if layers are stacked,
  # else 0. A leaf called cache_index they treat otherwise, and not consistently: after a prefill beam_search gives it a
  # beam axis and never flattens it. So the lengths go by another name.

  def _to_t5x(self, cache: KVCache) -> Cache:
    if self.module.scan_layers:
      return {**_named(cache.keys, cache.values), 'cached_lengths': cache.lengths[None]}
    layers = {
      f'{STACK}_{i}': _named(k, v) for i, (k, v) in enumerate(zip(cache.keys, cache.values))
    }
    return {**layers, 'cached_lengths': cache.lengths}

  def _from_t5x(self, cache: Mapping[str, Any]) -> KVCache:
    if self.module.scan_layers:
      return KVCache(*_keys_values(cache), cache['cached_lengths'][0])
    layers = [_keys_values(cache[f'{STACK}_{i}']) for i in range(self.model.config.num_layers)]
    return KVCache(*zip(*layers), cache['cached_lengths'])

  def _padded_batch(self, rows: int, copies: int = 1) -> int:
    """The smallest batch of at least `rows` that fills the mesh, as does `copies` times it."""
    if (
      self.model.mesh.size == 1
    ):  # where the batch may also be one of jax.export's symbols, which have no order
      return rows
    while True:
      rows = self.model.padded_batch(rows)
      if self.model.padded_batch(rows * copies) == rows * copies:
        return rows
      rows += 1

  def _check(self, batch: Batch) -> None:
    if 'decoder_segment_ids' in batch:
      raise RequestError('packed examples are not supported: set DatasetConfig.pack = False')


def _named(keys: KV, values: KV) -> Cache:
  """Keys and values as T5X's cache has them, by name; those of int8 have their scales beside them."""
  named = {}
  for name, kv in (('cached_key', keys), ('cached_value', values)):
    named.update(
      {name: kv.units, f'{name}_scale': kv.scales} if isinstance(kv, Int8KV) else {name: kv}
    )
  return named


def _keys_values(named: Mapping[str, jax.Array]) -> tuple[KV, KV]:
  """What _named was given."""
  return tuple(
    Int8KV(named[name], named[f'{name}_scale']) if f'{name}_scale' in named else named[name]
    for name in ('cached_key', 'cached_value')
  )


def _pad_rows(x: jax.Array, rows: int) -> jax.Array:
  """x [B, ...] with copies of its last row, [rows, ...]: a copy of a real row never makes decoding run longer."""
  return jnp.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1), mode='edge')
