"""Tests run with the package's annotations checked, shapes included."""

import jax.numpy as jnp
import jaxtyping
import pytest

from t5x_inference_ext.model.positions import rotary_angles
from t5x_inference_ext.quantization import int8
from tests import memory


def test_a_wrong_shape_is_refused():
  with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'positions'"):
    rotary_angles(jnp.zeros(4, jnp.int32), memory.ODD)
  with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'scale'"):
    int8.rescale(jnp.ones((2, 3)), jnp.ones(4))
