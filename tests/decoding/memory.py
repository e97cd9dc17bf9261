"""Small random models on a mesh, from memory: what the tests beside this file run."""

import jax
import numpy as np

from t5x_inference_ext.checkpoints.load import load_weights
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.decoding.model import Model
from t5x_inference_ext.engine import Engine
from t5x_inference_ext.layouts.mesh import make_mesh, parse_mesh
from tests import reference

# Nothing divides but what must: 3 heads on 2, 4 or 8 shards, 24 or 18 query columns, 101 rows of the embedding.
ODD = ModelConfig(num_layers=2, d_model=16, d_ff=24, num_heads=3, d_head=8, vocab_size=101)
ODDER = ModelConfig(
    num_layers=2, d_model=16, d_ff=24, num_heads=3, d_head=6, vocab_size=101, norm_scale='one', rope_max_timescale=100.)


def engine(config: ModelConfig, tensors: dict[str, np.ndarray], mesh: str, *, stacked: bool = False,
           dtype: str = 'float32') -> Engine:
  """The model of canonical `tensors` on a mesh 'XxYxZ' of simulated devices."""
  model = Model(config, make_mesh(parse_mesh(mesh)), dtype=dtype)
  checkpoint = reference.MemoryCheckpoint.of(config, tensors)
  return Engine(checkpoint, model, load_weights(checkpoint, model, stacked=stacked))


def tokens(config: ModelConfig, rows: int, length: int, seed: int = 0) -> np.ndarray:
  """[rows, length] int32 model inputs: BOS, then any ids."""
  ids = np.random.default_rng(seed).integers(1, config.vocab_size, (rows, length)).astype(np.int32)
  ids[:, 0] = 0
  return ids


def assert_same_weights(a, b) -> None:
  """Two pytrees of weights, bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and x.sharding == y.sharding
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
