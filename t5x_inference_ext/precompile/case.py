"""A phase of a model to compile: everything about the program except its devices."""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from t5x_inference_ext.checkpoints.load import scans_layers
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.saved_generation import GenerationShape, describe_run
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.kernel_attention import ATTENTION_KINDS
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.options import check_options, option
from t5x_inference_ext.precompile.phases import COMPILE_PHASES, CompilePhase
from t5x_inference_ext.quantization.formats import served_format
from t5x_inference_ext.sharding.layout import Layout

GREEDY = SamplingParams()
CHUNK = SchedulerConfig.prefill_chunk
CHECKED = 9  # tokens of a row in 'verify': the last one and a draft of 8
_GROUP = 'Program'


@dataclasses.dataclass(frozen=True)
class CompileCase:
  """A phase to compile, without its devices. Fields made with `option` are described there.

  Attributes:
    config: ModelConfig. The model.
    layout: Layout. The layout of the phase; for 'generate', the layout of its prefill.
    other_layout: Layout or None. The layout of the other phase, which shares the weights and passes
      on or receives the cache. By default ws_2d/batch; for ws_1d, which stores weights differently,
      ws_1d/batch.
    dtype: str. The dtype of activations and embedding.
    sampling: SamplingParams. How 'generate', 'slots' and 'admit' choose tokens; 'decode' and
      'prefill' are greedy.

  Raises:
    RequestError: A value is out of its range.
  """

  config: ModelConfig
  weights: str = option(
    help='Dtype of the weights: int8, int4 or bfloat16, or the whole format of a checkpoint with '
    'other bits for some tensors, such as int4,mlp_output:8 or int8,embedding:8.',
    group=_GROUP,
  )
  phase: str = option(
    help='; '.join(f'{name}: {phase.help}' for name, phase in COMPILE_PHASES.items()) + '.',
    choices=tuple(COMPILE_PHASES),
    group=_GROUP,
  )
  batch: int = option(
    help='Number of rows (for extend: prompts; for slots, verify and admit: slots).',
    least=1,
    group=_GROUP,
  )
  context: int = option(help='Positions of the KV cache for each row.', least=1, group=_GROUP)
  layout: Layout = Layout()
  prompt: int | None = option(
    None,
    help='Tokens of each row in one prefill. By default the whole context; for generate (BOS not '
    f'counted) the context without new tokens; for extend a chunk of {CHUNK}; for verify '
    f'{CHECKED}, the last token and a draft of {CHECKED - 1}. For admit the positions that a '
    'prompt has room for.',
    least=1,
    group=_GROUP,
  )
  other_layout: Layout | None = None
  dtype: str = 'bfloat16'
  cache: str | None = option(
    None,
    help='Dtype of the KV cache: int8, with a scale for each position and head, or bfloat16, '
    'the default.',
    choices=('int8', 'bfloat16'),
    group=_GROUP,
  )
  attention: str = option(
    'xla',
    help='How attention reads the KV cache. kernel: a Pallas kernel that reads filled positions '
    'only.',
    choices=ATTENTION_KINDS,
    group=_GROUP,
  )
  scan_layers: bool | None = option(
    None,
    help='One loop over all layers, which compiles in seconds. By default the layers are unrolled, '
    "as in infer on a TPU: each layer's weights are prefetched, and compiling takes a minute or "
    'two for 100 layers.',
    group=_GROUP,
  )
  max_new_tokens: int = option(
    64, help='Maximum number of new tokens of each row, for generate.', least=1, group=_GROUP
  )
  sampling: SamplingParams = GREEDY

  def __post_init__(self) -> None:
    check_options(self)
    object.__setattr__(self, 'weights', served_format(self.weights, self.config))
    if self.phase == 'generate':
      # BOS takes a position; the last new token takes none.
      if (self.prompt or 1) + self.max_new_tokens > self.context:
        raise RequestError(
          f'context={self.context} positions have no room for prompt={self.prompt or 1} and '
          f'max_new_tokens={self.max_new_tokens}'
        )
    elif self.length > self.context:
      raise RequestError(
        f'prompt={self.prompt} does not fit into context={self.context}, the positions of the cache'
      )

  @property
  def kind(self) -> CompilePhase:
    """The phase's entry in COMPILE_PHASES."""
    return COMPILE_PHASES[self.phase]

  @property
  def stacked(self) -> bool:
    """Whether the layers are one loop over stacked weights."""
    return scans_layers(self.config.num_layers, self.scan_layers)

  @property
  def length(self) -> int:
    """T, tokens of each row in one pass; for 'generate', in the prefill pass."""
    if self.phase == 'generate':
      return self.generation.prompt + 1
    if self.phase == 'extend':
      return self.prompt or min(CHUNK, self.context)
    if self.phase == 'verify':
      return self.prompt or CHECKED
    return 1 if self.kind.one_token else self.prompt or self.context

  @property
  def generation(self) -> GenerationShape:
    """The limits that a 'generate' program is compiled for."""
    prompt = self.prompt or self.context - self.max_new_tokens
    return GenerationShape(self.batch, prompt, self.context, self.max_new_tokens, self.sampling)

  @property
  def cache_dtype(self) -> str:
    """Dtype of the KV cache's values."""
    return self.cache or self.dtype

  @property
  def tokens(self) -> int:
    """Number of tokens of the whole batch in one pass."""
    return self.batch * self.length

  @property
  def layouts(self) -> tuple[Layout, Layout]:
    """(prefill layout, decode layout)."""
    if self.phase == 'extend':  # the cache of waiting prompts has the prefill layout
      return self.layout, self.layout
    other = self.other_layout or Layout('ws_1d' if self.layout.feedforward == 'ws_1d' else 'ws_2d')
    return (self.layout, other) if self.phase in ('prefill', 'generate') else (other, self.layout)

  def model(self, mesh: Mesh) -> Model:
    return Model(self.config, mesh, *self.layouts, self.dtype, self.cache, self.attention)

  def to_dict(self) -> dict[str, Any]:
    """Return the case, JSON-ready."""
    prefill, decode = self.layouts
    if self.phase == 'generate':
      return describe_run(
        self.config,
        self.weights,
        (prefill, decode),
        self.dtype,
        self.cache_dtype,
        self.stacked,
        self.generation,
      )
    sampled = self.phase in ('slots', 'admit')
    return {
      'model': self.config.to_dict(),
      'weights': self.weights,
      'phase': self.phase,
      'batch': self.batch,
      'context': self.context,
      'prompt': None if self.kind.one_token else self.length,
      'prefill_layout': str(prefill),
      'decode_layout': str(decode),
      'dtype': self.dtype,
      'cache': self.cache_dtype,
      'attention': self.attention,
      'stacked': self.stacked,
      **({'sampling': dataclasses.asdict(self.sampling)} if sampled else {}),
    }
