"""Types of values that pass between T5X and the adapter."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
# The parameters of a model: nested mappings of names to arrays, described in module.py.
Params = Mapping[str, Any]
# A batch of examples: a feature's name -> [B, L] int32.
Batch = Mapping[str, Array]
# A KV cache as T5X's decoding functions take it: see cache.py.
Cache = dict[str, Any]
# Predictions of a batch: (tokens, {'scores': ...}).
Predictions = tuple[Array, Mapping[str, Array]]
# T5X's decoding.temperature_sample or decoding.beam_search, or a function with their arguments.
DecodeFn = Callable[..., tuple[jax.Array, jax.Array]]
