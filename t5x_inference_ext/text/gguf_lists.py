"""Conversion of a GGUF file's lists (tokens, merges, token types) to a tokenizer.json."""

from collections.abc import Sequence
import json
from typing import Any

from t5x_inference_ext.errors import RequestError, printable
from t5x_inference_ext.text.tokenizer_json import TokenizerVocabulary
from t5x_inference_ext.text.vocabulary import SPACE_SIGN

# Values of GGUF's token types.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

# Regular expressions of pre-tokenizers, from the tokenizer.json of models that use them.
_LLAMA3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2 = _LLAMA3.replace('{1,3}', '')
_BLOOM = ' ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+'


def _byte_level(use_regex: bool = True) -> dict[str, Any]:
  return {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': True,
    'use_regex': use_regex,
  }


def _split(pattern: str) -> list[dict[str, Any]]:
  split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
  return [split, _byte_level(use_regex=False)]


_GPT2 = [_byte_level()]
_DIGITS = [{'type': 'Digits', 'individual_digits': True}, _byte_level()]
_FALCON = [
  {'type': 'Punctuation', 'behavior': 'Contiguous'},
  _byte_level(),
  {'type': 'Digits', 'individual_digits': False},
  _split('[0-9][0-9][0-9]')[0],
]
# Value of `tokenizer.ggml.pre` -> the steps that split a text before merges.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
  **dict.fromkeys(('gpt-2', 'gpt2', 'phi-2', 'mpt', 'olmo'), _GPT2),
  **dict.fromkeys(('smollm', 'starcoder', 'refact', 'command-r'), _DIGITS),
  **dict.fromkeys(('llama-bpe', 'llama3', 'llama-v3'), _split(_LLAMA3)),
  **dict.fromkeys(('qwen2', 'stablelm2'), _split(_QWEN2)),
  'falcon': _FALCON,
  'bloom': _split(_BLOOM),
}
# Pre-tokenizers of models that first look up a whole word as a token, before any merges.
_IGNORE_MERGES = ('llama-bpe', 'llama3', 'llama-v3')


def vocabulary_of_lists(
  name: str,
  tokens: Sequence[str],
  token_types: Sequence[int],
  *,
  merges: Sequence[str] = (),
  scores: Sequence[float] = (),
  model: str = 'gpt2',
  pre: str = 'gpt-2',
  bos_id: int | None = None,
  end_ids: Sequence[int] = (),
  add_space_prefix: bool = True,
) -> TokenizerVocabulary:
  """Build the vocabulary that the lists in a GGUF file's metadata describe.

  Args:
    name: Name for messages, such as the file's path.
    tokens: `tokenizer.ggml.tokens`.
    token_types: `tokenizer.ggml.token_type`, one for each token; empty: all are normal.
    merges: `tokenizer.ggml.merges`, for byte-level BPE: each is two tokens with a space between;
      highest priority first.
    scores: `tokenizer.ggml.scores`, for SentencePiece models.
    model: `tokenizer.ggml.model`: 'gpt2' (byte-level BPE) or 'llama' (SentencePiece's BPE).
    pre: `tokenizer.ggml.pre`, for byte-level BPE.
    bos_id: The id that is put in front of a prompt, if `tokenizer.ggml.add_bos_token` says so.
    end_ids: The ids that end a row.
    add_space_prefix: `tokenizer.ggml.add_space_prefix`, for SentencePiece models.

  Raises:
    RequestError: The lists contradict each other, or the model or its pre-tokenizer is not known.
  """
  where = f'the vocabulary of {printable(name)}'
  types = list(token_types) or [1] * len(tokens)
  if len(types) != len(tokens) or not all(isinstance(token, str) for token in tokens):
    raise RequestError(f'{where} is damaged: {len(tokens)} tokens have {len(types)} types')
  vocab = {token: i for i, token in enumerate(tokens)}
  if len(vocab) != len(tokens):
    twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
    raise RequestError(f'{where} is damaged: it holds the token "{printable(twice, 80)}" twice')
  if model == 'gpt2':
    parts = _bpe_parts(where, pre, [merge.split(' ') for merge in merges])
  elif model == 'llama':
    if len(scores) != len(tokens):
      raise RequestError(f'{where} is damaged: {len(tokens)} tokens have {len(scores)} scores')
    unknown = next((t for t, kind in zip(tokens, types) if kind == _UNKNOWN), None)
    pairs = _merges_of_scores(vocab, types, scores)
    parts = _sentencepiece_parts(pairs, unknown, add_space_prefix)
  else:
    raise RequestError(
      f'{where} is of the model "{printable(model, 80)}", which is not known: known are gpt2 and '
      'llama'
    )
  parts['model'] |= {'type': 'BPE', 'vocab': vocab, 'dropout': None}
  parts['added_tokens'] = [
    {
      'id': i,
      'content': token,
      'single_word': False,
      'lstrip': False,
      'rstrip': False,
      'normalized': False,
      'special': kind != _USER_DEFINED,
    }
    for i, (token, kind) in enumerate(zip(tokens, types))
    if kind in (_CONTROL, _USER_DEFINED) and token
  ]
  file = {'version': '1.0', 'truncation': None, 'padding': None, 'post_processor': None, **parts}
  return TokenizerVocabulary(name, json.dumps(file).encode(), bos_id, end_ids)


def _bpe_parts(where: str, pre: str, merges: list[list[str]]) -> dict[str, Any]:
  """Return the parts of a tokenizer.json of byte-level BPE, without its vocabulary."""
  if pre not in PRE_TOKENIZERS:
    raise RequestError(
      f'{where} has the pre-tokenizer "{printable(pre, 80)}", which is not known: known are '
      f'{", ".join(PRE_TOKENIZERS)}; use the tokenizer.json of the model'
    )
  wrong = next((merge for merge in merges if len(merge) != 2), None)
  if wrong is not None:
    raise RequestError(
      f'{where} is damaged: the merge "{printable(" ".join(wrong), 80)}" is not two tokens'
    )
  return {
    'normalizer': {'type': 'NFC'} if pre == 'qwen2' else None,
    'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': PRE_TOKENIZERS[pre]},
    'decoder': _byte_level(),
    'model': {'merges': merges, 'ignore_merges': pre in _IGNORE_MERGES},
  }


def _sentencepiece_parts(
  merges: list[list[str]], unknown: str | None, add_space_prefix: bool
) -> dict[str, Any]:
  """Return the parts of a tokenizer.json of SentencePiece's BPE, without its vocabulary."""
  space = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': SPACE_SIGN}
  prefix = [{'type': 'Prepend', 'prepend': SPACE_SIGN}] if add_space_prefix else []
  strip = [{'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}] if add_space_prefix else []
  decoders = [
    {'type': 'Replace', 'pattern': {'String': SPACE_SIGN}, 'content': ' '},
    {'type': 'ByteFallback'},
    {'type': 'Fuse'},
    *strip,
  ]
  return {
    'normalizer': {'type': 'Sequence', 'normalizers': [*prefix, space]},
    'pre_tokenizer': None,
    'decoder': {'type': 'Sequence', 'decoders': decoders},
    'model': {'merges': merges, 'unk_token': unknown, 'fuse_unk': True, 'byte_fallback': True},
  }


def _merges_of_scores(
  vocab: dict[str, int], types: Sequence[int], scores: Sequence[float]
) -> list[list[str]]:
  """Return all merges of two tokens into a third, sorted by the third's score, highest first."""
  normal = {token for token, i in vocab.items() if types[i] not in (_UNKNOWN, _CONTROL, _BYTE)}
  found = []
  for token in normal:
    for cut in range(1, len(token)):
      left, right = token[:cut], token[cut:]
      if left in normal and right in normal:
        found.append((-scores[vocab[token]], vocab[left], vocab[right], left, right))
  return [[left, right] for *_, left, right in sorted(found)]
