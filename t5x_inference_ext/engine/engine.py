"""The Python API: open a checkpoint on a mesh, generate, score.

engine = Engine.load('checkpoint_1000', mesh='2x2x2', dtype='float32')
for completion in engine.generate([[103, 104, 105], [108]], max_new_tokens=16):
  print(completion.tokens, completion.score)
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
import dataclasses
import functools
import os
import types
from typing import Any

import jax

from t5x_inference_ext.checkpoints import Checkpoint, open_checkpoint
from t5x_inference_ext.checkpoints.adapters.adapter import Adapter
from t5x_inference_ext.checkpoints.adapters.load import load_adapters
from t5x_inference_ext.checkpoints.identity import WeightsIdentity, weights_identity
from t5x_inference_ext.checkpoints.load import load_weights, scans_layers
from t5x_inference_ext.engine.adapters import AdapterNames, read_adapters
from t5x_inference_ext.engine.conversation import Conversation
from t5x_inference_ext.engine.core import Core
from t5x_inference_ext.engine.inputs import check_at_least
from t5x_inference_ext.engine.request import Completion, Sample, SampleCollector
from t5x_inference_ext.engine.request_making import RequestMaker
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.saved_generation import SavedGeneration
from t5x_inference_ext.engine.static_generation import StaticOptions, generate_static
from t5x_inference_ext.engine.streams import Stream
from t5x_inference_ext.engine.text_prompts import TextOrIds, decode_completion, encode_prompts
from t5x_inference_ext.engine.warm_up import CompiledProgram
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.sharding.layout import Layout, check_model
from t5x_inference_ext.sharding.mesh import make_mesh, parse_mesh
from t5x_inference_ext.sharding.mesh_choice import choose_mesh
from t5x_inference_ext.text.grammar import Grammar


@dataclasses.dataclass(frozen=True)
class Engine(RequestMaker):
  """A model with its weights on a mesh, which generates text and scores it (see Scorer).

  Attributes:
    executable: A saved program that `generate` runs instead of compiling one, or None.
  """

  executable: SavedGeneration | None = None

  @classmethod
  def load(
    cls,
    checkpoint: str | os.PathLike | Checkpoint,
    *,
    mesh: str | jax.sharding.Mesh | None = None,
    dtype: str = 'bfloat16',
    cache: str | None = None,
    attention: str = 'xla',
    prefill_layout: str = 'ws_2d/batch',
    decode_layout: str = 'ws_2d/batch',
    scan_layers: bool | None = None,
    executable: str | os.PathLike | None = None,
    adapters: Mapping[str, str | os.PathLike | Adapter] = types.MappingProxyType({}),
    progress: Callable[[list], Iterable] = iter,
    **conventions: Any,
  ) -> 'Engine':
    """Open a serving checkpoint, or a T5X checkpoint directly, and load it onto a mesh.

    Args:
      checkpoint: Directory, or the result of open_checkpoint.
      mesh: 'XxYxZ', a mesh with axes x, y, z, or None: the largest that divides the model.
      dtype: Type of activations and float weights, 'float32' or 'bfloat16'.
      cache: Type of the KV cache: 'float32', 'bfloat16', 'int8', or None: `dtype`.
      attention: 'xla', or 'kernel': a Pallas kernel reads the cache (Model.attention).
      prefill_layout: Layout of prefill, 'feedforward/attention'; see sharding.layout.Layout.
      decode_layout: Layout of decode steps.
      scan_layers: Whether one array holds all layers and the program loops over them; None: for
        more than 8 layers on CPU, never on accelerators.
      executable: File of a generation that precompile saved for this model, mesh and installation.
        It serves only what it was compiled for. Loading it runs code: use your own files.
      adapters: Name -> path, or read_adapter's result, of each adapter that prompts can choose.
      progress: Wraps the list of tensors that are loaded, e.g. tqdm.
      **conventions: Arguments of open_checkpoint: properties that can't be read from T5X weights.

    Raises:
      UserError: A checkpoint, mesh, layout, executable or option that does not fit (errors.py lists
        the subclasses), raised before weights are loaded; or a damaged tensor.
    """
    if not isinstance(checkpoint, Checkpoint):
      checkpoint = open_checkpoint(checkpoint, **conventions)
    if mesh is None:
      mesh = make_mesh(choose_mesh(checkpoint.config, jax.devices()))
    elif not isinstance(mesh, jax.sharding.Mesh):
      mesh = make_mesh(parse_mesh(mesh))
    check_model(checkpoint.config, mesh.shape)
    layouts = Layout.parse(prefill_layout), Layout.parse(decode_layout)
    model = Model(checkpoint.config, mesh, *layouts, dtype, cache, attention)
    platform = mesh.devices.flat[0].platform
    scans = scans_layers(model.config.num_layers, scan_layers, platform)
    saved = None
    if executable is not None:
      if adapters:
        raise RequestError(f'the executable {executable} was compiled without adapters')
      saved = SavedGeneration.open(executable, model, checkpoint.weights, scans)
    found = read_adapters(adapters, checkpoint)
    weights = load_weights(checkpoint, model, stacked=scans, progress=progress)
    if found:
      weights = load_adapters([*found.values()], checkpoint, model, weights)
    names = AdapterNames.of(found, model.config.vocab_size)
    return cls(checkpoint, model, weights, saved, adapters=names)

  def generate(
    self,
    prompts: Sequence[TextOrIds],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    seeds: Sequence[int] | None = None,
    eos_id: int | Sequence[int] | None = None,
    cache_size: int | None = None,
    prompt_size: int | None = None,
    max_length: int | None = None,
    prefill_chunk: int | None = None,
    adapter: str | None | Sequence[str | None] = None,
  ) -> list[Completion]:
    """Continue each prompt until EOS or its limit, in one static batch.

    Args:
      prompts: Texts, or token ids without BOS. An empty prompt means BOS alone, as in T5X.
        Texts need a checkpoint with a vocabulary.
      max_new_tokens: Maximum number of new tokens: one number for all prompts, or one for each.
      sampling: How tokens are chosen: for all prompts, or one for each.
      seeds: A seed for each prompt, 0 to 2**32 - 1; None: 0 for all.
      eos_id: Token that ends a row, or several; -1: no token does; None: the checkpoint's.
      cache_size: Cache positions of each row, BOS and new tokens included; None: as many as
        needed.
      prompt_size: Length that prompts are padded to, to share a compilation; None: the longest.
      max_length: A row also ends when prompt and new tokens together reach this number, as in T5X.
      prefill_chunk: Maximum number of prompt positions in one pass, to save memory; None: all.
      adapter: Name of a loaded adapter, for all prompts or one for each; None: the model itself.

    Raises:
      RequestError: No prompts, a prompt that is longer than the cache or holds ids outside the
        vocabulary, or an option out of its range.
      SavedError: The executable was compiled for other shapes or options.
      MeshError: A number of prompts that the decode layout can't split: see Model.padded_batch.
    """
    vocabulary = self.checkpoint.vocabulary
    ids, texts = encode_prompts(prompts, vocabulary)
    found = generate_static(
      self.model,
      self.weights,
      self.executable,
      ids,
      max_new_tokens,
      sampling,
      seeds,
      StaticOptions(
        self.checkpoint.bos_id,
        self._end_ids(eos_id),
        cache_size,
        prompt_size,
        max_length,
        prefill_chunk,
      ),
      self.adapters,
      adapter,
    )
    return [
      completion._replace(text=decode_completion(vocabulary, prompt, completion))
      if text
      else completion
      for prompt, text, completion in zip(ids, texts, found)
    ]

  def stream(
    self,
    prompts: Sequence[TextOrIds],
    *,
    max_new_tokens: int | Sequence[int],
    sampling: SamplingParams | Sequence[SamplingParams] = SamplingParams(),
    seeds: Sequence[int] | None = None,
    samples: int = 1,
    eos_id: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    top_log_probs: int = 0,
    salt: Hashable = None,
    grammar: Grammar | None = None,
    adapter: str | None | Sequence[str | None] = None,
    **options: Any,
  ) -> Stream:
    """Continue prompts with continuous batching; return each row's new tokens as they are made.

    The tokens equal those of `generate`. The engine's scheduler serves the prompts together with
    requests of other threads, and is kept for later calls with its programs and prefix cache.
    Iterate over the stream with `for` or `async for`; closing it ends the rows.

    Args:
      prompts: See `generate`. Events of texts carry text.
      max_new_tokens: See `generate`.
      sampling: See `generate`.
      seeds: See `generate`. The i-th sample of a prompt has the seed (prompt's seed + i) % 2**32.
      samples: Number of samples of each prompt.
      eos_id: See `generate`.
      stop: Text that ends a row, or several. The row's text does not include them.
      top_log_probs: Number of most likely tokens to return with each token.
      salt: Only prompts with equal salts share cached prefixes.
      grammar: Grammar that each row's new text must satisfy; None: any text is allowed.
      adapter: See `generate`.
      **options: Options of engine.scheduler_config.config_for: slots, max_length, pages,
        prefill_chunk, prefill_rows, prefill_budget, decode_steps, share, speculate. A call with
        other options than the last call, or with longer rows, makes a new scheduler.

    Raises:
      RequestError: Arguments that `generate` refuses, or an option out of its range; before
        anything runs.
    """
    ids, texts = encode_prompts(prompts, self.checkpoint.vocabulary)
    ends = self._end_ids(eos_id)
    requests = [
      dataclasses.replace(
        request,
        end_ids=ends,
        stop_texts=(stop,) if isinstance(stop, str) else tuple(stop),
        text=text,
        top_log_probs=top_log_probs,
        salt=salt,
        grammar=grammar,
        adapter=name,
      )
      for request, text, name in zip(
        self.requests(ids, max_new_tokens, sampling, seeds, samples),
        texts,
        self.adapters.of_rows(adapter, len(ids)),
      )
    ]
    return self.core.streams(requests, **options).open(requests)

  def complete(self, prompts: Sequence[TextOrIds], **options: Any) -> list[list[Sample]]:
    """Return the finished samples of each prompt; arguments and errors are those of `stream`."""
    collector, found = SampleCollector(), {}
    with self.stream(prompts, **options) as stream:
      for i, handle in enumerate(stream.handles):
        collector.expect(i, len(handle.request.seeds))
      for event in stream:
        samples = collector.add(event)
        if samples is not None:
          found[event.request] = samples
    return [found[i] for i in range(len(found))]

  def warm_up(self, **options: Any) -> list[CompiledProgram]:
    """Compile every program that `stream` needs with these options, and return the programs."""
    return self.core.streams(**options).scheduler.warm_up()

  @functools.cached_property
  def core(self) -> Core:
    """The engine's scheduler and its streams."""
    return Core(self.model, self.weights, self.checkpoint.vocabulary, self.adapters)

  @functools.cached_property
  def weights_identity(self) -> WeightsIdentity:
    """SHA-256 that identifies the checkpoint's weights, whatever its path; see WeightsIdentity."""
    return weights_identity(self.checkpoint)

  def chat(
    self,
    *,
    max_length: int,
    eos_id: int | Sequence[int] | None = None,
    adapter: str | None = None,
    **options: Any,
  ) -> Conversation:
    """Begin a conversation. The scheduler keeps the conversation's turns in the prefix cache.

    Args:
      max_length: Maximum number of tokens of the whole conversation.
      eos_id: See `generate`.
      adapter: Name of a loaded adapter; None: the model itself.
      **options: See `stream`.
    """
    check_at_least(1, max_length=max_length)
    self.adapters.number(adapter)
    room = max_length + 1 + len(self.adapters.prompt(adapter))
    return Conversation(
      self.core.streams(max_length=room, **{'slots': 1, **options}),
      vocab_size=self.model.config.vocab_size,
      max_length=max_length,
      bos=self.bos,
      end_ids=self._end_ids(eos_id),
      adapter=adapter,
    )
