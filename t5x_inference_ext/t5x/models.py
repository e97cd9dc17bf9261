"""InferenceModel, which gin files use in place of T5X's DecoderOnlyModel."""

from collections.abc import Callable, Mapping, MutableMapping
import copy
import dataclasses
import inspect
from typing import Any

from absl import logging
from flax import core as flax_core
import gin
import jax
import seqio
from t5x import decoding, models, utils

from t5x_inference_ext.checkpoints import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.conventions import Conventions
from t5x_inference_ext.checkpoints.load import scans_layers
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.options import takes_options
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import parse_mesh
from t5x_inference_ext.sharding.mesh_choice import choose_mesh
from t5x_inference_ext.t5x.decode_options import decode_options
from t5x_inference_ext.t5x.decoder import ShardedDecoder, is_concrete
from t5x_inference_ext.t5x.module import InferenceModule
from t5x_inference_ext.t5x.partitioning import inference_mesh
from t5x_inference_ext.t5x.refill import Predictor, Refill
from t5x_inference_ext.t5x.stock_model import conventions_in_front
from t5x_inference_ext.t5x.types import Batch, DecodeFn, Params, Predictions
from t5x_inference_ext.text.settings import BOS_ID, EOS_ID


def task_vocabulary(dataset_cfg: utils.DatasetConfig) -> seqio.Vocabulary:
  """Return the vocabulary of a task's targets, which turns predicted ids into text."""
  return utils.get_vocabulary(dataset_cfg)[1]


class InferenceModel(ShardedDecoder):
  """A PaLM-style decoder for T5X's inference: t5x.infer, interactive_model and export.

  Any batch size runs on any mesh: a batch is padded with copies of its last row, whose results are
  dropped.

  Args:
    vocabulary: Vocabulary of inputs and targets.
    checkpoint: str. Directory of a checkpoint. Only the model's config and the dtype of its weights
      are read from it. None: `config` is required.
    config: ModelConfig. Must equal that of the checkpoint if both are given.
    int8: Whether the matrices are int8; only used without a checkpoint.
    mesh: 'XxYxZ', over the first X*Y*Z devices. None: the largest mesh that divides the model,
      along the torus of a TPU slice (sharding.mesh_choice.choose_mesh). Or a jax Mesh with axes x,
      y and z; to precompile, it may be of devices that are not present
      (precompile.slices.slice_mesh).
    prefill_layout: Layout of prompts and scores, 'feedforward/attention'; see
      sharding.layout.Layout.
    decode_layout: Layout of decode steps.
    dtype: Dtype of activations and float weights: 'float32' or 'bfloat16'.
    cache: Dtype of the KV cache: 'float32', 'bfloat16', 'int8' (with a scale for each position and
      head), or None: `dtype`.
    attention: 'xla', or 'kernel': a Pallas kernel reads the cache (Model.attention).
    scan_layers: Whether one array holds all layers and the program loops over them. None: True only
      on CPU, for more than 8 layers.
    decode_fn: decoding.temperature_sample, decoding.beam_search, or a function that takes their
      arguments.
    task_feature_lengths: Lengths that the task's features are trimmed to, as T5X's datasets trim
      them. Prefill then runs over the length of inputs, instead of inputs and targets.
    refill: Refill. Predictions use slot refill, run from the host, with the options of `decode_fn`
      as defaults (decode_options.py). None: T5X's loop over a batch.
    feature_converter_cls: See T5X.
    inputs_bidirectional_attention: Must be False. Accepted because T5X's configurations bind it.
    **conventions: Arguments of open_checkpoint: properties of a T5X checkpoint that its weights do
      not show. Not needed if they are stated by T5X's own model, configured in an earlier gin file,
      or by a file beside the checkpoint.

  Raises:
    CheckpointError: There is no checkpoint, or it belongs to another model.
    MeshError: The mesh does not fit the devices or the model, or the two layouts can't share
      weights.
    RequestError: An option is not supported.
  """

  @takes_options(Conventions)
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
    attention: str = 'xla',
    scan_layers: bool | None = None,
    decode_fn: DecodeFn = decoding.temperature_sample,
    task_feature_lengths: Mapping[str, int] | None = None,
    refill: Refill | None = None,
    feature_converter_cls: Callable[..., seqio.FeatureConverter] | None = None,
    inputs_bidirectional_attention: bool = False,
    **conventions: Any,
  ) -> None:
    stock = _stock_bindings(models.DecoderOnlyModel, 'inputs_bidirectional_attention', 'decode_fn')
    if inputs_bidirectional_attention or stock.get('inputs_bidirectional_attention'):
      raise RequestError(
        'InferenceModel.inputs_bidirectional_attention: only causal attention is supported'
      )
    sampler = decoding.temperature_sample  # DECODE_FN's default
    if inspect.unwrap(decode_fn) is sampler:
      stock_fn = inspect.unwrap(stock.get('decode_fn', sampler))
      if stock_fn is not sampler:
        raise RequestError(
          f'models.DecoderOnlyModel.decode_fn = {getattr(stock_fn, "__name__", stock_fn)} has no '
          'effect on InferenceModel: bind DECODE_FN to it'
        )
    self._stock_options = _stock_bindings(
      models.DecoderOnlyModel.predict_batch_with_aux, 'return_all_decodes', 'num_decodes'
    )
    bos_id: int | None = BOS_ID
    weights = 'int8' if int8 else dtype
    self.notes: tuple[str, ...] = ()  # assumptions about the checkpoint, to log

    def open_with_conventions(path: str, config: ModelConfig | None = None) -> Checkpoint:
      """Open a checkpoint with the conventions that the user's gin files state."""
      return open_checkpoint(path, config=config, stock=_in_front, **conventions)

    self.open_checkpoint = open_with_conventions
    opened: Checkpoint | None = None
    if checkpoint is not None:
      opened = self.open_checkpoint(checkpoint, config=config)
      config, weights = opened.config, opened.weights
      self.notes, bos_id = opened.notes, opened.bos_id
      if vocabulary.eos_id not in opened.end_ids:
        logging.warning(
          'the vocabulary ends texts with %s, and %s with %s: rows end with the former',
          *(vocabulary.eos_id, opened.path, opened.end_ids),
        )
    elif config is None:
      raise RequestError(
        "InferenceModel needs a checkpoint to read the model's shape from, or a config"
      )
    else:
      stated = Conventions(**conventions).stated()
      stated.pop('rescale_logits', None)
      config = dataclasses.replace(config, **stated)
    if vocabulary.vocab_size > config.vocab_size:
      raise RequestError(
        f"the vocabulary has {vocabulary.vocab_size} ids and the model's embedding "
        f'{config.vocab_size} rows: this is not the vocabulary that the model was trained with'
      )
    model = Model(
      config,
      _mesh(mesh, config),
      Layout.parse(prefill_layout),
      Layout.parse(decode_layout),
      dtype,
      cache,
      attention,
    )
    inputs_length = (task_feature_lengths or {}).get('inputs')
    self._predictor: Predictor | None = None
    if refill is not None:
      refill = refill.with_defaults(decode_options(decode_fn))
      self._predictor = Predictor(model, refill, vocabulary.eos_id or EOS_ID, bos_id, opened)
    self._has_adapter = refill is not None and refill.adapter is not None
    platform = model.mesh.devices.flat[0].platform
    module = InferenceModule(model, weights, scans_layers(config.num_layers, scan_layers, platform))
    super().__init__(module, vocabulary, decode_fn, inputs_length, bos_id, feature_converter_cls)

  @property
  def refills(self) -> bool:
    """Whether predictions use slot refill, run from the host."""
    return self._predictor is not None

  def get_initial_variables(
    self,
    rng: jax.Array,
    input_shapes: Mapping[str, Any],
    input_types: Mapping[str, Any] | None = None,
  ) -> Mapping[str, Any]:
    """Return random parameters with their logical axes.

    T5X only needs their shapes if it restores a checkpoint.
    """
    del input_shapes, input_types
    return flax_core.freeze(self.module.init(rng))

  def predict_batch_with_aux(
    self,
    params: Params,
    batch: Batch,
    rng: jax.Array | None = None,
    *,
    return_all_decodes: bool | None = None,
    num_decodes: int | None = None,
    decoder_params: MutableMapping[str, Any] | None = None,
  ) -> Predictions:
    """Return predictions and scores; see ShardedDecoder.predict_batch_with_aux.

    The defaults of return_all_decodes and num_decodes are those that a gin file binds to T5X's own
    method, models.DecoderOnlyModel.predict_batch_with_aux, else False and 1.

    A model with `refill` predicts from the host, but in T5X's loop if the step is traced
    (t5x.export, precompile) or decoder_params are given.
    """
    if return_all_decodes is None:
      return_all_decodes = self._stock_options.get('return_all_decodes', False)
    if num_decodes is None:
      num_decodes = self._stock_options.get('num_decodes', 1)
    if self._predictor and decoder_params is None and is_concrete(params, batch):
      return self._predictor(params, batch, rng, num_decodes, return_all_decodes)
    self._check_no_adapter("T5X's own loop")
    return super().predict_batch_with_aux(
      params,
      batch,
      rng,
      return_all_decodes=return_all_decodes,
      num_decodes=num_decodes,
      decoder_params=decoder_params,
    )

  def score_batch(self, *arguments: Any, **options: Any) -> Any:
    """Return scores; see ShardedDecoder.score_batch."""
    self._check_no_adapter('score_batch')
    return super().score_batch(*arguments, **options)

  def _check_no_adapter(self, what: str) -> None:
    """Raise RequestError if the model has an adapter, which only predictions from the host have."""
    if self._has_adapter:
      raise RequestError(
        f'{what} does not take Refill.adapter: fold the adapter into the weights with '
        'convert_checkpoint --adapter, or leave it out'
      )


def _mesh(mesh: str | jax.sharding.Mesh | None, config: ModelConfig) -> jax.sharding.Mesh:
  """Return the mesh, with T5X's axis `data`, for InferenceModel's argument `mesh`."""
  if isinstance(mesh, jax.sharding.Mesh):
    return inference_mesh(mesh)
  return inference_mesh(choose_mesh(config, jax.devices()) if mesh is None else parse_mesh(mesh))


def _in_front() -> Conventions | None:
  """Return the conventions of T5X's own model, if the user's gin files configure one, else None."""
  return conventions_in_front(
    lambda: _stock_bindings(models.DecoderOnlyModel, 'module').get('module')
  )


def _stock_bindings(configurable: Callable, *names: str) -> dict[str, Any]:
  """Return the values that gin files bind to parameters of T5X's own model class or method.

  A T5X configuration that is included before infer.gin binds options of T5X's classes. Only because
  they are read here do they affect this model.
  """
  try:
    with gin.config_scope(None):
      bound = gin.get_bindings(configurable, resolve_references=False)
  except ValueError:  # no gin file binds parameters of this configurable
    return {}
  # deepcopy evaluates a gin reference. References bound to other parameters, such as the stock
  # module, are not evaluated.
  return {name: copy.deepcopy(bound[name]) for name in names if name in bound}
