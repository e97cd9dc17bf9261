"""The Python API: open a checkpoint on a mesh, generate, score.

engine = Engine.load('checkpoint_1000', mesh='2x2x2', dtype='float32')
for completion in engine.generate([[103, 104, 105], [108]], max_new_tokens=16):
  print(completion.tokens, completion.score)
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import os

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t5x_inference_ext.checkpoints import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.load import load_weights, scans_layers
from t5x_inference_ext.engine import length_buckets, programs, scheduler_config, scoring
from t5x_inference_ext.engine.conversation import Conversation
from t5x_inference_ext.engine.inputs import (
  BOS_ID,
  EOS_ID,
  check_arrays,
  check_at_least,
  check_generation,
  check_pairs,
  check_seeds,
  for_each,
  model_inputs,
)
from t5x_inference_ext.engine.request import Completion, Event, Request
from t5x_inference_ext.engine.sampling import SamplingParams, stack_params
from t5x_inference_ext.engine.saved_generation import GenerationShape, SavedGeneration
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.layout import Layout, check_model
from t5x_inference_ext.sharding.mesh import make_mesh, parse_mesh


@dataclasses.dataclass(frozen=True)
class Engine:
  """A model with its weights on a mesh.

  Attributes:
    checkpoint: where the weights came from, and what was found there.
    model: the functions, and the mesh.
    weights: on the mesh.
    executable: what runs generations instead of what jit would compile, or None.
  """

  checkpoint: Checkpoint
  model: Model
  weights: Weights
  executable: SavedGeneration | None = None

  @classmethod
  def load(
    cls,
    checkpoint: str | os.PathLike | Checkpoint,
    *,
    mesh: str | jax.sharding.Mesh = '1x1x1',
    dtype: str = 'bfloat16',
    cache: str | None = None,
    prefill_layout: str = 'ws_2d/batch',
    decode_layout: str = 'ws_2d/batch',
    norm_scale: str | None = None,
    scan_layers: bool | None = None,
    executable: str | os.PathLike | None = None,
    progress=iter,
  ) -> 'Engine':
    """Opens a serving checkpoint, or a T5X one directly, and loads it onto the mesh.

    Args:
      checkpoint: the directory, or what open_checkpoint made of it.
      mesh: 'XxYxZ', over the first X*Y*Z devices, or a mesh with axes x, y, z.
      dtype: of activations and float weights: 'float32' or 'bfloat16'. Int8 weights stay int8.
      cache: what the KV cache holds: 'float32', 'bfloat16', 'int8' with a scale for each position and head, or None: dtype.
      prefill_layout, decode_layout: 'feedforward/attention', for each phase; see sharding.layout.Layout.
      norm_scale: 'zero' or 'one' for a checkpoint that does not record how its norm scales are stored.
      scan_layers: one array for all layers and a loop over them, or arrays and code for each; by default a loop for more
        than 8 layers on CPU, on accelerators never.
      executable: a generation that precompile saved, for this model, mesh and versions: it runs instead of compiling, and
        only what it was compiled for. Loading one runs code: it has to be of your own making.
      progress: wraps the iterator over tensors, e.g. tqdm.

    Raises:
      CheckpointError, MeshError, RequestError, SavedError: before anything is loaded, unless a tensor itself is damaged.
    """
    mesh = make_mesh(parse_mesh(mesh)) if isinstance(mesh, str) else mesh
    if not isinstance(checkpoint, Checkpoint):
      checkpoint = open_checkpoint(checkpoint, norm_scale=norm_scale)
    check_model(checkpoint.config, mesh.shape)
    model = Model(
      checkpoint.config,
      mesh,
      Layout.parse(prefill_layout),
      Layout.parse(decode_layout),
      dtype,
      cache,
    )
    scan_layers = scans_layers(model.config.num_layers, scan_layers, mesh.devices.flat[0].platform)
    if executable is not None:
      executable = SavedGeneration.open(executable, model, checkpoint.weights, scan_layers)
    return cls(
      checkpoint,
      model,
      load_weights(checkpoint, model, stacked=scan_layers, progress=progress),
      executable,
    )

  def padded_batch(self, rows: int) -> int:
    """The smallest batch of at least `rows` that keeps the mesh as busy as so many rows can."""
    return self.model.padded_batch(rows)

  def generate(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    seeds: Sequence[int] | None = None,
    eos_id: int = EOS_ID,
    cache_size: int | None = None,
    prompt_size: int | None = None,
    max_length: int | None = None,
    prefill_chunk: int | None = None,
  ) -> list[Completion]:
    """Continues each prompt until EOS or the limit.

    Args:
      prompts: token ids without BOS; an empty prompt starts from BOS alone, as in T5X.
      max_new_tokens: the limit, of all or for each.
      sampler: how tokens are chosen: of all rows, or one for each.
      seeds: one a prompt, 0 to 2**32 - 1 (default: all 0; equal prompts then give equal completions).
      eos_id: ends a row; -1 never does.
      cache_size: positions that each row has, BOS and the new tokens included (default: as many as needed).
      prompt_size: pads prompts to this length, so that batches share one compilation (default: the longest).
      max_length: also ends a row when prompt and new tokens together are this many, as T5X does.
      prefill_chunk: positions of the prompts that one pass takes, for prompts whose activations take too much memory.

    Raises:
      RequestError: no prompts, a prompt longer than the cache or not of the vocabulary, or an option out of its range.
      SavedError: with an executable, anything but what it was compiled for.
      MeshError: a number of prompts that the decode layout can't split: see padded_batch.
    """
    limits, sampling_arrays, seeds = self._for_each(prompts, max_new_tokens, sampling, seeds)
    check_generation(
      prompts, self.model.config.vocab_size, limits, cache_size, prompt_size, max_length
    )
    if prefill_chunk is not None:
      check_at_least(1, prefill_chunk=prefill_chunk)
    self.model.decode_sharding(len(prompts))
    most, longest = max(limits), max(map(len, prompts))
    tokens, lengths = model_inputs(prompts, prompt_size or longest)
    # The last generated token is never fed back, so it takes no position.
    size = max(tokens.shape[1], cache_size or tokens.shape[1] + most - 1)
    stacked = stack_params(sampling_arrays, self.model.config.vocab_size)  # checks ids, too
    own = {}
    if not isinstance(sampling, SamplingParams):
      own['sampling_arrays'], sampling = stacked, SamplingParams()
    if not isinstance(max_new_tokens, int):
      own['limits'] = np.asarray(limits, np.int32)
    run = GenerationShape(
      len(prompts), tokens.shape[1] - 1, size, most, sampling, eos_id, max_length
    )
    program = self._generation(run, bool(own), prefill_chunk)
    arguments = self._put(tokens, lengths, np.asarray(seeds).astype(np.uint32), own)
    result = jax.device_get(program(self.weights, *arguments[:3], **arguments[3]))
    return [Completion(row[:n].tolist(), float(score)) for row, n, score in zip(*result)]

  def stream(
    self,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    seeds: Sequence[int] | None = None,
    samples: int = 1,
    slots: int = 32,
    eos_id: int = EOS_ID,
    **options,
  ) -> Iterator[Event]:
    """Continues prompts in slots that are kept full, and yields each row's new tokens as they are made.

    Tokens are those of `generate`. What prompts begin with in common is prefilled once, as is a prompt of many samples.

    Args:
      prompts, max_new_tokens, sampler, seeds, eos_id: as generate's.
      samples: of each prompt. The i-th has the seed (prompt's seed + i) % 2**32.
      slots: rows decoded together, at most, rounded up to what the mesh takes.
      options: engine.scheduler_config.config_for's: prefill_chunk, prefill_rows,
        prefill_budget, decode_steps, share, top_log_probs.

    Raises:
      RequestError: what generate refuses, or an option out of its range; before anything runs.
    """
    asked = self.requests(prompts, max_new_tokens, sampling, seeds, samples)
    config, shared = scheduler_config.config_for(
      self.model, asked, slots=slots, eos_id=eos_id, **options
    )
    return Scheduler(self.model, self.weights, config, shared).run(asked)

  def requests(
    self, prompts, max_new_tokens, sampling=SamplingParams(), seeds=None, samples: int = 1
  ) -> list[Request]:
    """Prompts as the scheduler takes them; arguments, and errors, are stream's."""
    limits, sampling_arrays, seeds = self._for_each(prompts, max_new_tokens, sampling, seeds)
    check_generation(prompts, self.model.config.vocab_size, limits)
    stack_params(sampling_arrays, self.model.config.vocab_size)  # checks ids
    if samples < 1:
      raise RequestError(f'samples must be at least 1, got {samples}')
    return [
      Request((BOS_ID, *prompt), tuple((int(seed) + i) % 2**32 for i in range(samples)), limit, one)
      for prompt, seed, limit, one in zip(prompts, seeds, limits, sampling_arrays)
    ]

  def _for_each(self, prompts, max_new_tokens, sampling, seeds):
    seeds = for_each(prompts, 'seeds', 0 if seeds is None else seeds)
    check_seeds(seeds)
    return (
      for_each(prompts, 'limits', max_new_tokens),
      for_each(prompts, 'sampling parameters', sampling),
      seeds,
    )

  def chat(self, *, max_length: int, eos_id: int = EOS_ID, chunk: int = 256) -> Conversation:
    """A conversation of at most so many tokens, whose cache is kept between turns; see engine.conversation."""
    return Conversation(
      self.model, self.weights, max_length=max_length, bos_id=BOS_ID, eos_id=eos_id, chunk=chunk
    )

  def score(
    self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None
  ) -> np.ndarray:
    """The sum over positions of weight * log p(target | inputs so far).

    Args:
      inputs: [B, T] model inputs: targets shifted right, BOS first.
      targets: [B, T] token ids.
      weights: [B, T], by default 1 where a target is not 0 (padding).

    Returns:
      [B] float32.

    Raises:
      RequestError: arrays of different shapes or of none, or what are no token ids of the vocabulary.
    """
    weights = np.asarray(np.asarray(targets) != 0 if weights is None else weights, np.float32)
    check_arrays(self.model.config.vocab_size, inputs, targets, weights=weights)
    return np.sum(self.log_probs(inputs, targets) * weights, axis=1)

  def log_probs(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """log p(target | inputs so far) at each position, [B, T] float32; arguments as score's."""
    check_arrays(self.model.config.vocab_size, inputs, targets)
    inputs, targets = np.asarray(inputs, np.int32), np.asarray(targets, np.int32)
    return np.asarray(programs.log_probs(self.model, self.weights, *self._put(inputs, targets)))

  def score_completions(
    self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, tokens: int = 8192
  ) -> list[list[float]]:
    """The log-probabilities of each completion's tokens after its prompt; their sum is its score.

    Pairs of like lengths are scored together, whatever their order.

    Args:
      pairs: (prompt, completion), token ids without BOS.
      tokens: scored at once, padding included.

    Raises:
      RequestError: what are no token ids of the vocabulary, naming the pair (counted from 0).
    """
    check_at_least(1, tokens=tokens)
    check_pairs(pairs, self.model.config.vocab_size)
    examples = [scoring.ScoringExample.of(*pair) for pair in pairs]
    packer = length_buckets.packer(self.model, tokens)
    found: dict[int, np.ndarray] = {}
    for pack in packer.pack([len(example.targets) for example in examples]):
      found.update(scoring.score_pack(self.log_probs, examples, pack))
    return [found[i][len(prompt) :].tolist() for i, (prompt, _) in enumerate(pairs)]

  def logits(self, inputs: np.ndarray) -> np.ndarray:
    """inputs [B, T] model inputs -> [B, T, V] float32 logits after each position."""
    check_arrays(self.model.config.vocab_size, inputs)
    return np.asarray(
      programs.logits(self.model, self.weights, *self._put(np.asarray(inputs, np.int32)))
    )

  def _generation(self, run: GenerationShape, per_row: bool, prefill_chunk: int | None):
    """The function of (weights, tokens, lengths, seeds), and what rows have of their own, that generates a batch."""
    if self.executable is None:
      return functools.partial(
        programs.generate_batch, self.model, **run.options(), prefill_chunk=prefill_chunk
      )
    if per_row or prefill_chunk is not None:
      what = 'one sampler and limit' if per_row else 'prompts in one pass'
      raise RequestError(
        f'the executable {self.executable.path} was compiled for {what}: run without it'
      )
    self.executable.check_run(run)
    return self.executable.load(
      *programs.generation_program(self.model, run, self.weights), self.model.mesh
    )

  def _put(self, *arrays):
    return jax.device_put(arrays, NamedSharding(self.model.mesh, P()))
