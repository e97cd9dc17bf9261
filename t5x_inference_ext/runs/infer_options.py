"""Options of the infer command: each field defines a flag, a gin parameter and their checks."""

import dataclasses
import math
from typing import Any

from t5x_inference_ext.checkpoints.conventions import CONVENTION_NAMES, Conventions
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.engine.adapters import named_paths
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.engine.sampling_arrays import stack_params
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.model.kernel_attention import ATTENTION_KINDS
from t5x_inference_ext.model.shardings import CACHE_DTYPES, COMPUTE_DTYPES
from t5x_inference_ext.options import check_options, option
from t5x_inference_ext.sharding.layout import ATTENTION, FEEDFORWARD, Layout, check_pair
from t5x_inference_ext.speculation import parse_speculation
from t5x_inference_ext.text.stop_texts import check_stop_texts

BATCHING = ('continuous', 'static')
MODES = ('predict', 'predict_with_aux', 'score')
# Headings of --help, in order.
_NEEDED, _COMMON, _WRITTEN, _SHARDING, _BATCHING, _ADAPTERS = (
  'Required',
  'Common',
  'Written for each token',
  'Sharding, memory and compilation',
  'Batching',
  'Adapters',
)


def _layout_help(phase: str) -> str:
  return (
    f'Layout of {phase}, feedforward/attention: {", ".join(FEEDFORWARD)} / '
    f'{", ".join(ATTENTION)}. See docs/layouts.md.'
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InferOptions(Conventions):
  """Options of a run of the infer command, over a prompts file or a seqio task.

  Attributes without a flag of their own:
    config: Model that the checkpoint must hold; None: any.
    max_length: Maximum number of tokens of a row, prompt and new tokens together; None: no limit.
    sampling: How tokens are chosen. `sampling.stop` has token ids, the attribute `stop` has texts.

  Raises:
    RequestError: A value is out of its range, or two options exclude each other.
    MeshError: A layout is unknown, or the layouts can't share weights.
  """

  checkpoint: str = option(
    help='Path of a checkpoint: serving, T5X (legacy or Orbax) or a public model.', group=_NEEDED
  )
  max_new_tokens: int = option(
    64, help='Maximum number of new tokens of each row.', group=_COMMON, least=1
  )
  mode: str = option(
    'predict',
    help='predict generates a completion for each row; score gives the log-probability of the '
    "row's own completion. predict_with_aux adds scores to the rows of a task; for a prompts file, "
    'whose rows always have scores, it is the same as predict.',
    group=_COMMON,
    choices=MODES,
  )
  num_decodes: int = option(
    1,
    help='Number of samples of each prompt; they share its prefill. Several are written as a list, '
    '`samples`.',
    group=_COMMON,
    least=1,
    most=10**6,
  )
  seed: int = option(
    0,
    help='Seed of the run, from which the seed of every row is derived.',
    group=_COMMON,
    least=0,
    most=math.inf,
  )
  batch_size: int = option(
    32, help='Number of rows decoded together, rounded up for the mesh.', group=_COMMON, least=1
  )
  mesh: str | None = option(
    None,
    help='Mesh XxYxZ, such as 2x2x2, over the first devices. By default over all devices that '
    'divide the model.',
    group=_COMMON,
  )
  dtype: str = option(
    'bfloat16',
    help='Dtype of activations and float weights; int8 weights stay int8.',
    group=_COMMON,
    choices=COMPUTE_DTYPES,
  )
  stop: tuple[str, ...] = option(
    (),
    help='A text that ends a row; the completion ends before it. Tokens may split the text in any '
    'way. May be repeated.',
    group='Choosing tokens',
  )
  token_log_probs: bool = option(
    False,
    help="Write each token's log-probability, as `log_probs`. For generated tokens this needs "
    'continuous batching.',
    group=_WRITTEN,
  )
  top_log_probs: int = option(
    0,
    help='Write this many of the most likely tokens at each step, with log-probabilities, as '
    '`top_log_probs`. Needs continuous batching.',
    group=_WRITTEN,
    least=0,
  )
  prefill_layout: str = option('ws_2d/batch', help=_layout_help('prefill'), group=_SHARDING)
  decode_layout: str = option('ws_2d/batch', help=_layout_help('decode'), group=_SHARDING)
  cache: str | None = option(
    None,
    help='Dtype of the KV cache. int8 has a scale for each position and head, and takes half the '
    'memory of bfloat16. By default --dtype.',
    group=_SHARDING,
    choices=CACHE_DTYPES,
  )
  attention: str = option(
    'xla',
    help='How attention reads the KV cache. kernel: a Pallas kernel for TPUs and long contexts.',
    group=_SHARDING,
    choices=ATTENTION_KINDS,
  )
  cache_length: int | None = option(
    None,
    help="Positions of each row's cache, new tokens included; a prompt that does not fit is an "
    'error. By default as many as the longest prompt needs.',
    group=_SHARDING,
    least=1,
  )
  scan_layers: bool | None = option(
    None,
    help='Run all layers as one loop, which compiles in seconds; --noscan_layers unrolls them, '
    'which decodes faster on a TPU or GPU. By default a loop for more than 8 layers on CPU, else '
    'none.',
    group=_SHARDING,
  )
  executable: str | None = option(
    None,
    help='File with a program compiled for these chips by `python -m t5x_inference_ext.precompile '
    '--phase=generate --save`: nothing is compiled, and the program sets batch and prompt size. '
    'The file is run as code: use only files that you made.',
    group=_SHARDING,
  )
  batching: str = option(
    'continuous',
    help='continuous: a waiting prompt takes the slot of a finished row at once. static: a batch '
    'runs until its last row ends. Both give equal rows.',
    group=_BATCHING,
    choices=BATCHING,
  )
  prefill_chunk: int = option(
    256,
    help='Maximum prompt positions of a pass, later an eighth more, with continuous batching.',
    group=_BATCHING,
    least=1,
  )
  prefill_budget: int = option(
    2048,
    help='Maximum number of prompt tokens prefilled between two decode steps, with continuous '
    'batching.',
    group=_BATCHING,
    least=1,
  )
  adapters: tuple[str, ...] = option(
    (),
    help='Adapters that rows can choose, NAME=PATH[,NAME=PATH...]: directories that PEFT saved, or '
    'saved prompts of T5X (docs/adapters.md). May be repeated.',
    group=_ADAPTERS,
  )
  adapter: str | None = option(
    None,
    help='Name of the adapter of rows that name none; by default the model itself.',
    group=_ADAPTERS,
  )
  speculate: str | None = option(
    None,
    help='Drafts of the next tokens, so that a step may give several: ngram:8 drafts up to 8 that '
    "followed a row's last tokens where they stood before; draft:DIR:4 up to 4 that the model of "
    'the checkpoint DIR draws, which has the same vocabulary. The tokens stay those without '
    'drafts. Needs continuous batching.',
    group=_BATCHING,
  )
  config: ModelConfig | None = None
  max_length: int | None = None
  sampling: SamplingParams = SamplingParams()

  def __post_init__(self) -> None:
    check_options(self)
    check_pair(*self.layouts)
    check_stop_texts(self.stop)
    object.__setattr__(self, 'stop', tuple(self.stop))
    object.__setattr__(self, 'adapters', tuple(self.adapters))
    self._check_generation_options()
    named_paths(self.adapters, self.adapter)
    if self.speculate is not None:
      parse_speculation(self.speculate)
    if self.executable is not None and self.mode == 'score':
      raise RequestError(f"the executable {self.executable} can't run mode=score: it generates")
    # An empty prompt needs max_new_tokens positions: one for BOS, none for the last new token.
    room = self.cache_length
    if self.mode != 'score' and room is not None and room < self.max_new_tokens:
      raise RequestError(
        f'cache_length={self.cache_length} has no room for max_new_tokens={self.max_new_tokens}: '
        'raise cache_length or lower max_new_tokens'
      )

  def _check_generation_options(self) -> None:
    """Raise RequestError for options that the mode or the batching does not support."""
    if self.mode != 'score' and self.continuous:
      return
    given: dict[str, Any] = {
      'num_decodes': self.num_decodes > 1,
      'top_log_probs': self.top_log_probs,
      'speculate': self.speculate,
    }
    if self.mode == 'score':
      given |= {'stop': self.stop or self.sampling.stop, 'logit_bias': self.sampling.logit_bias}
      why = 'is for runs that generate: mode=score generates no tokens'
    else:
      given |= {'token_log_probs': self.token_log_probs}
      why = 'needs batching=continuous: a static batch gives one sample of each row, and its score'
      if self.executable is not None:
        why = (
          f"can't be used with the executable {self.executable}: it gives one sample of each row, "
          'and its score'
        )
    for name, value in given.items():
      if value:
        raise RequestError(f'{name} {why}')

  @property
  def adapter_paths(self) -> dict[str, str]:
    """Name -> path of each adapter."""
    return named_paths(self.adapters)

  @property
  def conventions(self) -> dict[str, Any]:
    """Conventions that the user states, as arguments of open_checkpoint."""
    return {name: getattr(self, name) for name in CONVENTION_NAMES}

  @property
  def layouts(self) -> tuple[Layout, Layout]:
    """Layouts of prefill and of decode."""
    return Layout.parse(self.prefill_layout), Layout.parse(self.decode_layout)

  @property
  def continuous(self) -> bool:
    """Whether the run uses slot refill; with a saved program, it does not."""
    return self.batching == 'continuous' and self.executable is None

  @property
  def max_prompt(self) -> int | None:
    """Maximum number of prompt tokens for which the cache has room; None: no limit."""
    return None if self.cache_length is None else self.cache_length - self.max_new_tokens


@dataclasses.dataclass(frozen=True)
class PromptsFiles:
  """Files that a run over prompts reads and writes, and the vocabulary of their text."""

  prompts: str = option(help='JSONL file of prompts to read.', group=_NEEDED)
  output: str = option(
    help='JSONL file to write; it appears when it is complete. Resolved options go into '
    'OUTPUT.config.json.',
    group=_NEEDED,
  )
  vocabulary: str | None = option(
    None,
    help='`bytes`, or the path of a SentencePiece .model file or of a tokenizer.json. By default '
    "the checkpoint's own, else bytes for a model of 384 rows.",
    group=_COMMON,
  )
  overwrite: bool = option(False, help='Replace an existing output.', group=_COMMON)

  def __post_init__(self) -> None:
    check_options(self)


def check_vocab_size(options: InferOptions, vocab_size: int) -> None:
  """Raise RequestError for options with token ids beyond the model's embedding."""
  if options.top_log_probs > vocab_size:
    raise RequestError(
      f'top_log_probs={options.top_log_probs} is more than the vocabulary of {vocab_size}'
    )
  stack_params([options.sampling], vocab_size)
