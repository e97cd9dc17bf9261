"""The nonlinearity of each kind of MLP (ModelConfig.mlp)."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp

# Kind of MLP -> its nonlinearity, applied to the gate; without a gate, to the input product.
_FUNCTIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  'swiglu': jax.nn.swish,
  'geglu': functools.partial(jax.nn.gelu, approximate=True),
  'geglu_erf': functools.partial(jax.nn.gelu, approximate=False),
  'reglu': jax.nn.relu,
  'glu': jax.nn.sigmoid,
  'bilinear': lambda x: x,
  'gelu': functools.partial(jax.nn.gelu, approximate=True),
  'gelu_erf': functools.partial(jax.nn.gelu, approximate=False),
  'relu': jax.nn.relu,
  'relu_squared': lambda x: jnp.square(jax.nn.relu(x)),
  'swish': jax.nn.swish,
}


def activate(mlp: str, linear: jax.Array, gate: jax.Array | None = None) -> jax.Array:
  """Return f(gate) * linear, or f(linear) for an MLP without a gate.

  Args:
    mlp: One of features.MLPS.
    linear: [b, t, f]. Product with the matrix 'linear'.
    gate: [b, t, f]. Product with the matrix 'gate', or None if the MLP has none.
  """
  function = _FUNCTIONS[mlp]
  return function(linear) if gate is None else function(gate) * linear
