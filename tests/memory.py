"""Small random models on a mesh, from memory, for tests to run."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from t5x_inference_ext.checkpoints.load import load_weights
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import make_mesh, parse_mesh
from tests import reference

# Nothing divides but what must: 3 heads on 2, 4 or 8 shards, 24 or 18 query columns, 101 rows of
# the embedding.
ODD = ModelConfig(num_layers=2, d_model=16, d_ff=24, num_heads=3, d_head=8, vocab_size=101)
ODDER = ModelConfig(
  num_layers=2,
  d_model=16,
  d_ff=24,
  num_heads=3,
  d_head=6,
  vocab_size=101,
  norm_scale='one',
  rope_max_timescale=100.0,
)


def engine(
  config: ModelConfig,
  tensors: dict[str, np.ndarray],
  mesh: str,
  *,
  stacked: bool = False,
  dtype: str = 'float32',
  prefill: str = 'ws_2d/batch',
  decode: str = 'ws_2d/batch',
  cache: str | None = None,
) -> Engine:
  """Load canonical `tensors` onto a mesh 'XxYxZ' of simulated devices, in these layouts."""
  model = Model(
    config, make_mesh(parse_mesh(mesh)), Layout.parse(prefill), Layout.parse(decode), dtype, cache
  )
  checkpoint = reference.MemoryCheckpoint.of(config, tensors)
  return Engine(checkpoint, model, load_weights(checkpoint, model, stacked=stacked))


def tokens(config: ModelConfig, rows: int, length: int, seed: int = 0) -> np.ndarray:
  """Return random model inputs [rows, length] int32: BOS, then any ids."""
  ids = np.random.default_rng(seed).integers(1, config.vocab_size, (rows, length)).astype(np.int32)
  ids[:, 0] = 0
  return ids


class Greedy(NamedTuple):
  """Prompts, and a model's greedy continuation with the logits that chose each token.

  Attributes:
    tokens: [B, T] int32. Model inputs, each row BOS, its prompt, its continuation, then any ids.
    lengths: [B] int32. Positions of BOS and prompt.
    logits: [steps, B, V]. Logits that chose each new token.
  """

  tokens: np.ndarray
  lengths: np.ndarray
  logits: np.ndarray

  @property
  def chosen(self) -> np.ndarray:
    """Chosen token ids [steps, B]."""
    return np.stack(
      [self.tokens[np.arange(len(self.lengths)), self.lengths + i] for i in range(len(self.logits))]
    )

  def first(self, rows: int) -> 'Greedy':
    """Return the first rows alone: a row does not depend on the others."""
    return Greedy(self.tokens[:rows], self.lengths[:rows], self.logits[:, :rows])


def greedy(config: ModelConfig, tensors: dict[str, np.ndarray], rows: int, steps: int) -> Greedy:
  """Continue random prompts of 0, 1, 2, 3, 0, 1, ... tokens with the reference model."""
  lengths, everyone = np.arange(rows, dtype=np.int32) % 4 + 1, np.arange(rows)
  inputs = tokens(config, rows, 4 + steps)
  logits = []
  for step in range(steps):
    logits.append(reference.logits(config, tensors, inputs)[everyone, lengths - 1 + step])
    inputs[everyone, lengths + step] = np.argmax(logits[-1], axis=-1)
  return Greedy(inputs, lengths, np.stack(logits))


# jax.jit without optimizations, which take three quarters of compile time; the partitioned program
# is the same.
QUICK_OPTIONS = {'xla_backend_optimization_level': 0, 'xla_cpu_use_fusion_emitters': False}
# For all programs of a process that a test starts, in its XLA_FLAGS.
QUICK_FLAGS = ' '.join(f'--{name}={str(value).lower()}' for name, value in QUICK_OPTIONS.items())
quick_jit = functools.partial(jax.jit, compiler_options=QUICK_OPTIONS)
prefill = quick_jit(Model.prefill, static_argnames=('self', 'size'))
decode_step = quick_jit(Model.decode_step, static_argnames='self')


def decode(engine: Engine, wanted: Greedy, prompt_size: int, *, forced: bool = False) -> Greedy:
  """Continue the prompts of `wanted`: a prefill, then a decode step for each token but the last.

  A step takes the token that the model itself chose, or with `forced` the one in `wanted`. Prompts
  are padded to prompt_size with ids that must not matter.
  """
  rows, steps, everyone = len(wanted.lengths), len(wanted.logits), np.arange(len(wanted.lengths))
  tokens = wanted.tokens.copy()
  tokens[np.arange(tokens.shape[1])[None, :] >= wanted.lengths[:, None]] = 77
  prompts = np.full((rows, prompt_size), 77, np.int32)
  prompts[:, : tokens.shape[1]] = tokens[:, :prompt_size]
  size = max(prompt_size, max(wanted.lengths) + steps - 1)  # the last token is not fed back
  logits, cache = prefill(
    engine.model,
    engine.weights,
    *programs.put(engine.model, prompts, wanted.lengths),
    size=int(size),
  )
  found = []
  for step in range(steps):
    found.append(np.asarray(logits))
    token = wanted.chosen[step] if forced else np.argmax(logits, axis=-1).astype(np.int32)
    tokens[everyone, wanted.lengths + step] = token
    if step < steps - 1:
      logits, cache = decode_step(
        engine.model, engine.weights, cache, *programs.put(engine.model, np.asarray(token))
      )
  np.testing.assert_array_equal(cache.lengths, wanted.lengths + steps - 1)
  return Greedy(tokens, wanted.lengths, np.stack(found))


def assert_same_weights(a, b) -> None:
  """Assert that two pytrees of weights are equal, bit for bit."""
  assert jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.leaves(a)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and x.sharding == y.sharding
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
