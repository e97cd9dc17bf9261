"""Small vocabularies of each kind, trained on a few lines of this project."""

import functools
import io
import json
import pathlib

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from t5x_inference_ext.text.sentencepiece_model import SentencePieceVocabulary
from t5x_inference_ext.text.tokenizer_json import TokenizerVocabulary
from t5x_inference_ext.text.vocabulary import ByteVocabulary, Vocabulary

_LINES = (
  (pathlib.Path(__file__).resolve().parents[2] / 'LICENSE').read_text(encoding='utf-8').splitlines()
)
# Options of a SentencePiece model that changes no text.
PLAIN = {
  'add_dummy_prefix': False,
  'normalization_rule_name': 'identity',
  'remove_extra_whitespaces': False,
}
SPECIAL = ['<s>', '</s>']


@functools.cache
def byte_level_json() -> bytes:
  """A byte-level BPE, as GPT-2's and SmolLM2's; <s> is 0 and </s> 1."""
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Digits(individual_digits=True),
      pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
  )
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=380, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(_LINES, trainer)
  return tokenizer.to_str().encode()


@functools.cache
def llama_json() -> bytes:
  """A BPE with byte fallback, as Llama 2's: the file itself puts <s> in front."""
  tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token='<unk>'))
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend('\u2581'), normalizers.Replace(' ', '\u2581')]
  )
  # No token crosses a space, as in SentencePiece.
  tokenizer.pre_tokenizer = pre_tokenizers.Split('\u2581', 'merged_with_next')
  byte_tokens = [f'<0x{byte:02X}>' for byte in range(256)]
  trainer = trainers.BpeTrainer(
    vocab_size=500, special_tokens=['<unk>', *SPECIAL, *byte_tokens], show_progress=False
  )
  tokenizer.train_from_iterator(_LINES, trainer)
  content = json.loads(tokenizer.to_str())
  # Byte tokens are the model's own, not special ones that a prompt may name.
  content['added_tokens'] = content['added_tokens'][:3]
  content['pre_tokenizer'] = None
  tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace('\u2581', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  tokenizer.post_processor = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 1)])
  return tokenizer.to_str().encode()


@functools.cache
def letters_json() -> bytes:
  """A token for each printable character of ASCII, 98 ids.

  The file itself puts <s>, 1, in front.
  """
  names = ['<unk>', *SPECIAL, *map(chr, range(32, 127))]
  vocab = {name: i for i, name in enumerate(names)}
  tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token='<unk>'))
  tokenizer.add_special_tokens(names[:3])
  tokenizer.decoder = decoders.Fuse()
  tokenizer.post_processor = processors.TemplateProcessing('<s> $A', special_tokens=[('<s>', 1)])
  return tokenizer.to_str().encode()


@functools.cache
def sentencepiece_model(**options) -> bytes:
  """A SentencePiece model with byte fallback; 600 ids."""
  data = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(_LINES),
    model_writer=data,
    vocab_size=600,
    byte_fallback=True,
    minloglevel=2,
    **options,
  )
  return data.getvalue()


class Characters(Vocabulary):
  """A vocabulary for the smallest models: tokens 3 to 96 are a printable character each."""

  kind = name = 'characters'
  bos_id, end_ids, size = 0, (1,), 97

  def encode(self, text):
    return [ord(character) - 30 for character in text]

  def piece(self, token, special=False):
    return bytes([token + 30]) if 3 <= token < self.size else b''


@functools.cache
def of_kind(kind: str):
  """A vocabulary by name: bytes, byte_level, llama, sentencepiece, sentencepiece_plain."""
  if kind == 'bytes':
    return ByteVocabulary()
  if kind == 'byte_level':
    return TokenizerVocabulary('tokenizer.json', byte_level_json(), end_ids=(1,))
  if kind == 'llama':
    return TokenizerVocabulary('tokenizer.json', llama_json(), 1, (2,))
  if kind == 'sentencepiece':
    return SentencePieceVocabulary('words.model', sentencepiece_model())
  return SentencePieceVocabulary('words.model', sentencepiece_model(**PLAIN))


KINDS = ('bytes', 'byte_level', 'llama', 'sentencepiece', 'sentencepiece_plain')
