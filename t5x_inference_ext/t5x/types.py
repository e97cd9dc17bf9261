"""Types of what T5X hands to the adapter, and takes back."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray
# The parameters of a model: nested mappings of names to arrays (module.py says which).
Params = Mapping[str, Any]
# A batch of examples: a feature's name -> [B, L] int32.
Batch = Mapping[str, Array]
# A KV cache as T5X's decoding functions take it: see cache.py.
Cache = dict[str, Any]
# (tokens, {'scores': ...}) of a batch.
Predictions = tuple[Array, Mapping[str, Array]]
# T5X's decoding.temperature_sample, decoding.beam_search, and others that take their arguments.
DecodeFn = Callable[..., tuple[jax.Array, jax.Array]]
