"""The Python API: open a checkpoint on a mesh, generate, score.

engine = Engine.load('checkpoint_1000', mesh='2x2x2', dtype='float32')
for completion in engine.generate([[103, 104, 105], [108]], max_new_tokens=16):
  print(completion.tokens, completion.score)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import os
from typing import Any

import jax
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
  model_inputs,
  per_prompt,
)
from t5x_inference_ext.engine.request import Completion, Event, Request, completion
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import end_id_array, stack_params
from t5x_inference_ext.engine.saved_generation import GenerationShape, SavedGeneration
from t5x_inference_ext.engine.scheduler import Scheduler
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.sharding.layout import Layout, check_model
from t5x_inference_ext.sharding.mesh import make_mesh, parse_mesh
from t5x_inference_ext.sharding.mesh_choice import choose_mesh


@dataclasses.dataclass(frozen=True)
class Engine:
  """A model with its weights on a mesh.

  Attributes:
    checkpoint: The checkpoint that the weights came from, and what was found in it.
    model: Functions of the model, and the mesh.
    weights: Weights on the mesh.
    executable: A saved program that runs generations in place of compiled ones, or None.
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
    mesh: str | jax.sharding.Mesh | None = '1x1x1',
    dtype: str = 'bfloat16',
    cache: str | None = None,
    prefill_layout: str = 'ws_2d/batch',
    decode_layout: str = 'ws_2d/batch',
    norm_scale: str | None = None,
    scan_layers: bool | None = None,
    executable: str | os.PathLike | None = None,
    progress: Callable[[list], Iterable] = iter,
  ) -> 'Engine':
    """Open a serving checkpoint, or a T5X checkpoint directly, and load it onto a mesh.

    Args:
      checkpoint: Directory, or the result of open_checkpoint.
      mesh: 'XxYxZ' over the first X*Y*Z devices; a mesh with axes x, y, z; or None: all devices
        that divide the model.
      dtype: Type of activations and float weights, 'float32' or 'bfloat16'; int8 stays int8.
      cache: Type of the KV cache: 'float32', 'bfloat16', 'int8' (with a scale for each position
        and head), or None: `dtype`.
      prefill_layout: Layout of prefill, 'feedforward/attention'; see sharding.layout.Layout.
      decode_layout: Layout of decode steps.
      norm_scale: 'zero' or 'one', where a checkpoint does not record how it stores norm scales.
      scan_layers: Whether one array holds all layers and the program loops over them; None: a
        loop for more than 8 layers on CPU, never on accelerators.
      executable: File of a generation that precompile saved for this model, mesh and these
        versions. It runs only what it was compiled for. Loading one runs code: use your own files.
      progress: Wraps the list of tensors that are loaded, e.g. tqdm.

    Raises:
      UserError: A checkpoint, mesh, layout, executable or option that does not fit (errors.py lists
        the subclasses), raised before weights are loaded; or a damaged tensor.
    """
    if not isinstance(checkpoint, Checkpoint):
      checkpoint = open_checkpoint(checkpoint, norm_scale=norm_scale)
    if mesh is None:
      mesh = make_mesh(choose_mesh(checkpoint.config, jax.devices()))
    elif isinstance(mesh, str):
      mesh = make_mesh(parse_mesh(mesh))
    check_model(checkpoint.config, mesh.shape)
    layouts = Layout.parse(prefill_layout), Layout.parse(decode_layout)
    model = Model(checkpoint.config, mesh, *layouts, dtype, cache)
    platform = mesh.devices.flat[0].platform
    scans = scans_layers(model.config.num_layers, scan_layers, platform)
    saved = None
    if executable is not None:
      saved = SavedGeneration.open(executable, model, checkpoint.weights, scans)
    weights = load_weights(checkpoint, model, stacked=scans, progress=progress)
    return cls(checkpoint, model, weights, saved)

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
    """Continue each prompt until EOS or its limit, in one static batch.

    Args:
      prompts: Token ids without BOS. An empty prompt starts from BOS alone, as in T5X.
      max_new_tokens: Most new tokens: one number for all prompts, or one for each.
      sampling: How tokens are chosen: for all prompts, or one for each.
      seeds: A seed for each prompt, 0 to 2**32 - 1; None: 0 for all.
      eos_id: Token that ends a row; -1 never does.
      cache_size: Cache positions of each row, BOS and new tokens included; None: as many as
        needed.
      prompt_size: Length that prompts are padded to, to share a compilation; None: the longest.
      max_length: Also ends a row when prompt and new tokens together are this many, as T5X does.
      prefill_chunk: Most positions of the prompts in one pass, to save memory; None: all.

    Raises:
      RequestError: No prompts, a prompt that is longer than the cache or holds ids outside the
        vocabulary, or an option out of its range.
      SavedError: With an executable, anything but what it was compiled for.
      MeshError: A number of prompts that the decode layout can't split: see Model.padded_batch.
    """
    limits, params, seeds = per_prompt(prompts, max_new_tokens, sampling, seeds)
    vocab_size = self.model.config.vocab_size
    check_generation(prompts, vocab_size, limits, cache_size, prompt_size, max_length)
    if prefill_chunk is not None:
      check_at_least(1, prefill_chunk=prefill_chunk)
    self.model.decode_sharding(len(prompts))
    tokens, lengths = model_inputs(prompts, prompt_size or max(map(len, prompts)))
    # The last generated token is never fed back, so it takes no position.
    size = max(tokens.shape[1], cache_size or tokens.shape[1] + max(limits) - 1)
    stacked = stack_params(params, vocab_size)  # checks ids, too
    own: dict[str, Any] = {}
    per_row = not isinstance(max_new_tokens, int) or not isinstance(sampling, SamplingParams)
    compiled, ends = params[0], eos_id
    if self.executable is None:  # one program for any values of what is data
      own = {'sampling_arrays': stacked, 'limits': np.asarray(limits, np.int32)}
      own['end_ids'] = end_id_array(eos_id, len(prompts))
      compiled, ends = SamplingParams(), -1
    sizes = len(prompts), tokens.shape[1] - 1, size, max(limits)
    shape = GenerationShape(*sizes, compiled, ends, max_length)
    program = programs.generation_for(
      self.model, self.weights, shape, self.executable, per_row, prefill_chunk
    )
    row_seeds = np.asarray(seeds, np.uint32)
    *inputs, own = programs.put(self.model, tokens, lengths, row_seeds, own)
    rows = zip(*jax.device_get(program(self.weights, *inputs, **own)), params, strict=True)
    return [completion(row[:n], score, each, (eos_id,), bad) for row, n, score, bad, each in rows]

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
    **options: Any,
  ) -> Iterator[Event]:
    """Continue prompts in slots that are kept full; yield each row's new tokens as they are made.

    Tokens are those of `generate`. A prefix that prompts share is prefilled once, and so is a
    prompt of many samples.

    Args:
      prompts: See `generate`.
      max_new_tokens: See `generate`.
      sampling: See `generate`.
      seeds: See `generate`. The i-th sample of a prompt has the seed (prompt's seed + i) % 2**32.
      samples: Samples of each prompt.
      slots: Most rows decoded together, rounded up to a number that the mesh can split.
      eos_id: See `generate`.
      **options: Options of engine.scheduler_config.config_for: prefill_chunk, prefill_rows,
        prefill_budget, decode_steps, share, top_log_probs.

    Raises:
      RequestError: Arguments that `generate` refuses, or an option out of its range; before
        anything runs.
    """
    requests = self.requests(prompts, max_new_tokens, sampling, seeds, samples)
    config, shared = scheduler_config.config_for(
      self.model, requests, slots=slots, eos_id=eos_id, **options
    )
    return Scheduler(self.model, self.weights, config, shared).run(requests)

  def requests(
    self,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    seeds: Sequence[int] | None = None,
    samples: int = 1,
  ) -> list[Request]:
    """Return prompts as requests of a scheduler; arguments and errors are those of `stream`."""
    limits, params, seeds = per_prompt(prompts, max_new_tokens, sampling, seeds)
    vocab_size = self.model.config.vocab_size
    check_generation(prompts, vocab_size, limits)
    stack_params(params, vocab_size)  # checks ids
    if samples < 1:
      raise RequestError(f'samples must be at least 1, got {samples}')
    return [
      Request(
        (BOS_ID, *prompt), tuple((int(seed) + i) % 2**32 for i in range(samples)), limit, each
      )
      for prompt, seed, limit, each in zip(prompts, seeds, limits, params)
    ]

  def chat(self, *, max_length: int, eos_id: int = EOS_ID, chunk: int = 256) -> Conversation:
    """Begin a conversation, whose cache is kept between turns.

    Args:
      max_length: Most tokens of the whole conversation.
      eos_id: Token that ends a reply; -1 never does.
      chunk: Most positions of a turn in one prefill pass.
    """
    return Conversation(
      self.model, self.weights, max_length=max_length, bos_id=BOS_ID, eos_id=eos_id, chunk=chunk
    )

  def score(
    self, inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray | None = None
  ) -> np.ndarray:
    """Return the sum over positions of weight * log p(target | inputs so far).

    Args:
      inputs: [B, T] model inputs: targets shifted right, BOS first.
      targets: [B, T] token ids.
      weights: [B, T] float32; None: 1 where a target is not 0 (padding).

    Returns:
      [B] float32.

    Raises:
      RequestError: Empty arrays or arrays of different shapes, or ids outside the vocabulary.
    """
    weights = np.asarray(np.asarray(targets) != 0 if weights is None else weights, np.float32)
    check_arrays(self.model.config.vocab_size, inputs, targets, weights=weights)
    return np.sum(self.log_probs(inputs, targets) * weights, axis=1)

  def log_probs(self, inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return log p(target | inputs so far) at each position, [B, T] float32; see `score`."""
    check_arrays(self.model.config.vocab_size, inputs, targets)
    inputs, targets = np.asarray(inputs, np.int32), np.asarray(targets, np.int32)
    return np.asarray(
      programs.log_probs(self.model, self.weights, *programs.put(self.model, inputs, targets))
    )

  def score_completions(
    self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, tokens: int = 8192
  ) -> list[list[float]]:
    """Return the log-probabilities of each completion's tokens after its prompt.

    Their sum is the completion's score. Pairs of similar lengths are scored together.

    Args:
      pairs: Pairs (prompt, completion) of token ids without BOS.
      tokens: Most tokens of a batch, padding included.

    Raises:
      RequestError: Ids outside the vocabulary, naming the pair, counted from 0.
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
    """Return the logits after each position of model inputs [B, T]: [B, T, V] float32."""
    check_arrays(self.model.config.vocab_size, inputs)
    tokens = programs.put(self.model, np.asarray(inputs, np.int32))
    return np.asarray(programs.logits(self.model, self.weights, *tokens))
