"""Conventions of T5X's own ("stock") model, if the user's gin files configure it before ours.

The stock module is built and traced without values, so that both gin bindings and defaults of its
classes are found.
"""

from collections.abc import Callable, Iterator
from typing import Any

from flax import linen as nn
import gin
import jax
import jax.numpy as jnp

from t5x_inference_ext.checkpoints.conventions import STOCK, Conventions
from t5x_inference_ext.checkpoints.readers.stock_modules import (
  DECODER_ONLY,
  DECODER_ONLY_MODULES,
  FLAXFORMER,
  OPTIONS,
  StockModule,
  conventions_of,
)
from t5x_inference_ext.errors import RequestError

_LENGTH = 8  # number of tokens of the traced batch


# Text of gin's configuration -> the conventions that it states. Only the last text is kept: gin
# builds the model several times from one configuration.
_KNOWN: dict[str, Conventions | None] = {}


def conventions_in_front(make: Callable[[], nn.Module | None]) -> Conventions | None:
  """Return the conventions of the stock model that gin configures; None if there is none.

  Args:
    make: Returns the value that gin binds to models.DecoderOnlyModel.module, or None.

  Raises:
    RequestError: The module can't be built.
    CheckpointError: Its model can't be served.
  """
  key = gin.config_str()
  if key not in _KNOWN:
    try:
      module = make()
    except Exception as e:  # a user's configuration may raise anything
      raise _not_built(e) from e
    _KNOWN.clear()
    _KNOWN[key] = None if module is None else stock_conventions(module)
  return _KNOWN[key]


def _not_built(error: Exception) -> RequestError:
  return RequestError(
    f"{STOCK}, can't be built to read what it computes: {type(error).__name__}: {error!s:.500}"
  )


def stock_conventions(module: nn.Module) -> Conventions:
  """Return the conventions of a flax module that T5X's DecoderOnlyModel can run.

  Args:
    module: flaxformer's DecoderOnly, T5X's decoder_only, or a module made of their parts.

  Raises:
    RequestError: The module can't be built.
    CheckpointError: Its model can't be served.
  """
  found: dict[int, nn.Module] = {}

  def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
    found[id(context.module)] = context.module
    return call(*args, **kwargs)

  tokens = jnp.zeros((1, _LENGTH), jnp.int32)
  keys = {name: jax.random.PRNGKey(0) for name in ('params', 'dropout')}
  try:
    with nn.intercept_methods(record):
      jax.eval_shape(lambda: module.init(keys, tokens, tokens, enable_dropout=False))
  except Exception as e:  # a user's module may raise anything
    raise _not_built(e) from e
  options = [option for each in found.values() for option in _options(each)]
  return conventions_of(options, STOCK)


def _options(module: nn.Module) -> Iterator[StockModule]:
  """Yield the submodules' options that weights do not show."""
  name, home = type(module).__name__, f'{type(module).__module__}.'
  if home.startswith(DECODER_ONLY):
    yield from DECODER_ONLY_MODULES
  if isinstance(module, nn.LayerNorm):  # flax's own class, whose scales are centred at 1
    name = 'LayerNorm'
    yield StockModule(name, 'center_scale_at_zero', False)
  elif not home.startswith((FLAXFORMER, DECODER_ONLY)) or name not in OPTIONS:
    return
  for option in OPTIONS[name]:
    value = getattr(module, option, None)
    if option == 'activations':
      value = tuple(a if isinstance(a, str) else _function_name(a) for a in value or ())
    if value is not None:
      yield StockModule(name, option, value)


def _function_name(function: Any) -> str:
  """Return flax's name of an activation, or the function as text."""
  name = getattr(function, '__name__', '')
  return name if getattr(nn, name, None) is function else repr(function)
