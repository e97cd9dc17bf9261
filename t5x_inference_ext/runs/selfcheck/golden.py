"""Check tokens in every pair of layouts against golden ones, by T5X or a NumPy reference."""

from collections.abc import Iterator, Sequence
import dataclasses
import importlib.resources
import json
import math
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from t5x_inference_ext.checkpoints import Checkpoint
from t5x_inference_ext.checkpoints.load import load_weights
from t5x_inference_ext.compiler_options import compiler_options, take_int4
from t5x_inference_ext.engine import programs
from t5x_inference_ext.engine.inputs import model_inputs
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.model.cache import KVCache
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.precompile.case import CompileCase
from t5x_inference_ext.precompile.program import phase_function
from t5x_inference_ext.sharding.layout import ATTENTION, FEEDFORWARD, Layout, check_pair

# Number of tokens to decode, unless both phases have one layout and weights are float32: then all
# golden tokens are decoded. FEW_STEPS: for two layouts, between which the cache is resharded after
# the first token. ROUNDED_STEPS: for int8 and int4 weights, which change matmuls but not the cache.
FEW_STEPS, ROUNDED_STEPS = 8, 16
DTYPES = ('float32', 'int8', 'int4')  # of weights that have golden tokens
_CONTEXT = 96  # positions of the cache: the longest prompt, BOS and all new tokens, in whole tiles
# XLA passes to turn off on a CPU, besides those of selfcheck.few_optimizations, so that loops
# compile faster.
_QUICK: dict[str, Any] = {'xla_cpu_use_fusion_emitters': False}


class Goldens(NamedTuple):
  """Prompts, and the tokens that the bundled model decodes greedily after each.

  Attributes:
    checkpoint: SHA-256 of the checkpoint's WeightsIdentity.
    prompts: Token ids of the prompts, without BOS.
    tokens: Dtype of the weights -> new tokens of each prompt. T5X decoded those of 'float32'; a
      NumPy reference with the rounded weights decoded those of 'int8' and 'int4'.
  """

  checkpoint: str
  prompts: list[list[int]]
  tokens: dict[str, list[list[int]]]


def read_goldens() -> Goldens:
  """Return the golden tokens that are bundled with the package."""
  file = importlib.resources.files('t5x_inference_ext.runs.selfcheck') / 'golden.json'
  content = json.loads(file.read_text(encoding='utf-8'))
  rows = content['rows']
  tokens = {dtype: [row[dtype] for row in rows] for dtype in DTYPES}
  return Goldens(content['checkpoint'], [row['prompt_tokens'] for row in rows], tokens)


@dataclasses.dataclass(frozen=True)
class PairResult:
  """The comparison of one pair of layouts' tokens with the golden tokens.

  Attributes:
    prefill: Layout of prefill.
    decode: Layout of decode steps.
    weights: Dtype of the weights.
    steps: Number of tokens compared for each row.
    seconds: Time to compile and run, in seconds.
    different: How the first wrong token differs; '' if there is none.
    impossible: Why this pair is impossible on the mesh; '' if it is possible.
  """

  prefill: str
  decode: str
  weights: str
  steps: int
  seconds: float
  different: str = ''
  impossible: str = ''

  @property
  def name(self) -> str:
    """The pair's name in messages."""
    return f'{self.weights} weights, prefill {self.prefill}, decode {self.decode}'


def layout_pairs() -> list[tuple[Layout, Layout]]:
  """Return every pair of layouts that can share weights, with plain collectives."""
  layouts = []
  for feedforward in FEEDFORWARD:
    for attention in ATTENTION:
      try:
        layouts.append(Layout(feedforward, attention))
      except MeshError:  # such as wg_xyz/heads, which leaves no axis for heads
        continue
  pairs = []
  for prefill in layouts:
    for decode in layouts:
      try:
        check_pair(prefill, decode)
      except MeshError:  # ws_1d and the others store weights differently
        continue
      pairs.append((prefill, decode))
  return pairs


def check_goldens(
  checkpoint: Checkpoint,
  mesh: jax.sharding.Mesh,
  goldens: Goldens,
  pairs: Sequence[tuple[Layout, Layout]],
) -> Iterator[PairResult]:
  """Decode the golden prompts in pairs of layouts, in float32; yield a result for each pair.

  Args:
    checkpoint: The bundled model, with weights of a dtype that `goldens` has.
    mesh: The devices.
    goldens: Prompts and tokens.
    pairs: Pairs (prefill layout, decode layout).
  """
  check = _Check(checkpoint, mesh, goldens)
  for prefill, decode in pairs:
    begin = time.perf_counter()
    rounded = checkpoint.weights != 'float32'
    steps = ROUNDED_STEPS if rounded else len(goldens.tokens['float32'][0])
    steps = steps if prefill == decode else FEW_STEPS
    different = impossible = ''
    try:
      different = check.difference(prefill, decode, steps)
    except MeshError as error:
      impossible = str(error)
    seconds = time.perf_counter() - begin
    yield PairResult(
      str(prefill), str(decode), checkpoint.weights, steps, seconds, different, impossible
    )


class _Check:
  """Decodes in pairs of layouts, and caches what several pairs share.

  Weights are shared by layouts that store them alike, a prefill by all pairs with its layout, and a
  compiled decode step likewise. Prefill's cache is in the prefill layout: it is resharded before
  decode, as after a prefill in chunks.
  """

  def __init__(self, checkpoint: Checkpoint, mesh: jax.sharding.Mesh, goldens: Goldens) -> None:
    self._checkpoint, self._mesh = checkpoint, mesh
    self._wanted = goldens.tokens[checkpoint.weights]
    # Every layout can split a number of rows that is a multiple of the number of devices.
    rows = math.lcm(len(goldens.prompts), mesh.size)
    prompts = [goldens.prompts[i % len(goldens.prompts)] for i in range(rows)]
    self._tokens, self._lengths = model_inputs(prompts, max(map(len, prompts)))
    self._weights: dict[str, Weights] = {}
    self._prefilled: dict[Layout, tuple[jax.Array, KVCache]] = {}
    self._steps: dict[Layout, Any] = {}

  def difference(self, prefill: Layout, decode: Layout, steps: int) -> str:
    """Return how the first wrong token differs; '' if there is none."""
    before, after = self._model('prefill', prefill), self._model('decode', decode)
    weights = self._stored(before)
    if prefill not in self._prefilled:
      run = self._compile('prefill', prefill)
      self._prefilled[prefill] = run(weights, *programs.put(before, self._tokens, self._lengths))
    if decode not in self._steps:
      self._steps[decode] = self._compile('decode', decode)
    tokens, cache = self._prefilled[prefill]
    cache = programs.move_cache(before, cache, weights, to=after)
    found = [np.asarray(tokens)]
    for _ in range(steps - 1):
      tokens, cache = self._steps[decode](weights, cache, tokens)
      found.append(np.asarray(tokens))
    return self._first_difference(np.stack(found, axis=1))

  def _first_difference(self, found: np.ndarray) -> str:
    for row, tokens in enumerate(found.tolist()):
      wanted = self._wanted[row % len(self._wanted)]
      for step, (token, golden) in enumerate(zip(tokens, wanted)):
        if token != golden:
          return f'token {step} of row {row} is {token}, and should be {golden}'
    return ''

  def _case(self, phase: str, layout: Layout) -> CompileCase:
    return CompileCase(
      self._checkpoint.config,
      'bfloat16' if self._checkpoint.weights == 'float32' else self._checkpoint.weights,
      phase,
      len(self._lengths),
      _CONTEXT,
      layout,
      self._tokens.shape[1] if phase == 'prefill' else None,
      layout,
      dtype='float32',
      scan_layers=True,
    )

  def _model(self, phase: str, layout: Layout) -> Model:
    return self._case(phase, layout).model(self._mesh)

  def _stored(self, model: Model) -> Weights:
    kind = str(model.prefill_layout.stored_embed)
    if kind not in self._weights:
      self._weights[kind] = load_weights(self._checkpoint, model, stacked=True)
    return self._weights[kind]

  def _compile(self, phase: str, layout: Layout) -> Any:
    """Return the compiled phase."""
    function, arguments = phase_function(self._case(phase, layout), self._mesh)
    device = self._mesh.devices.flat[0]
    options: Any = _QUICK if device.platform == 'cpu' else compiler_options(device)
    # By default a TPU rounds the operands of float32 matmuls to bfloat16.
    with jax.default_matmul_precision('highest'), programs.stated_dtypes():
      return take_int4(function.lower(*arguments).compile(compiler_options=options))
