"""Options of T5X's decode_fn with slot refill: each is either followed, or refused with a reason.

Slot refill does not call decode_fn. It reads the options that gin or functools.partial binds to
decoding.temperature_sample, and samples accordingly.
"""

import dataclasses
import functools
import inspect
import numbers
from typing import Any

import gin
from t5x import decoding

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.t5x.types import DecodeFn

_WITHOUT = 'leave out configs/t5x/continuous.gin (InferenceModel.refill)'
# Options of temperature_sample that slot refill follows.
_TAKEN = ('temperature', 'topk', 'topp', 'max_decode_steps', 'max_decode_steps_hard_limit')
# Option that slot refill does not support -> what to do instead.
_INSTEAD = {
  'num_decodes': 'bind InferenceModel.predict_batch_with_aux.num_decodes instead',
  'logit_callback_fn': f'bind LOGIT_BIAS or a penalty instead, or {_WITHOUT}',
  'rescale_log_probs': "bind False, as scores are of the model's own distribution here, "
  f'or {_WITHOUT}',
}


@dataclasses.dataclass(frozen=True)
class DecodeOptions:
  """The options of a decode_fn that slot refill follows.

  Attributes:
    temperature: float. See SamplingParams; 0 if topk is 1, because T5X then decodes greedily.
    top_k: int. See SamplingParams.
    top_p: float. See SamplingParams.
    max_new_tokens: int or None. See Refill.
  """

  temperature: float
  top_k: int
  top_p: float
  max_new_tokens: int | None


def decode_options(decode_fn: DecodeFn) -> DecodeOptions:
  """Return the options of a decode_fn that slot refill follows.

  Args:
    decode_fn: decoding.temperature_sample, gin's configurable of it, or a functools.partial of
      either.

  Raises:
    RequestError: decode_fn is another function, or has an option that slot refill does not support.
  """
  bound = _bound_options(decode_fn)
  parameters = inspect.signature(decoding.temperature_sample).parameters
  defaults = {name: parameter.default for name, parameter in parameters.items()}
  for name, value in bound.items():
    # True is T5X's default: as a default it is ignored, but an explicit binding to True is refused.
    asked_for = name == 'rescale_log_probs' and value
    if asked_for or (name not in (*_TAKEN, 'rescale_log_probs') and value != defaults.get(name)):
      raise RequestError(
        f'slot refill does not take temperature_sample.{name} = {value!r}: '
        f'{_INSTEAD.get(name, _WITHOUT)}'
      )
  temperature, top_k, top_p, steps, most = ({**defaults, **bound}[name] for name in _TAKEN)
  if top_k and top_p:
    raise RequestError(
      f'temperature_sample takes topk = {top_k!r} or topp = {top_p!r}, not both: bind topk = 0, or '
      'TOP_K and TOP_P of continuous.gin'
    )
  if top_k == 1:  # T5X's default: greedy at any temperature
    temperature, top_k = 0.0, 0
  elif isinstance(temperature, numbers.Real) and temperature <= decoding.MIN_TEMPERATURE:
    temperature = 0.0
  if steps is not None and most is not None and most > 0:
    steps = min(steps, most)
  return DecodeOptions(temperature, top_k, top_p or 1.0, steps)


def decode_option(name: str, decode_fn: DecodeFn) -> float | int | None:
  """Return one field of `decode_options`, for the defaults of macros in continuous.gin.

  Args:
    name: A field of DecodeOptions.
    decode_fn: See `decode_options`.
  """
  return getattr(decode_options(decode_fn), name)


def _bound_options(decode_fn: DecodeFn) -> dict[str, Any]:
  """Return the options bound to temperature_sample, by functools.partial or by gin."""
  if isinstance(decode_fn, functools.partial) and not decode_fn.args:
    return {**_bound_options(decode_fn.func), **decode_fn.keywords}
  if decode_fn is decoding.temperature_sample:
    return {}
  if inspect.unwrap(decode_fn) is decoding.temperature_sample:
    try:
      with gin.config_scope(None):  # T5X calls the function outside of gin scopes
        return gin.get_bindings(decode_fn)
    except ValueError:
      pass  # a scoped reference, @scope/decoding.temperature_sample, not the configurable itself
  name = getattr(decode_fn, '__name__', repr(decode_fn))
  raise RequestError(
    f'slot refill chooses tokens as decoding.temperature_sample does, and has no decode_fn {name!r}'
    ' with code or a gin scope of its own: bind DECODE_FN = @decoding.temperature_sample, or '
    f'{_WITHOUT}'
  )
