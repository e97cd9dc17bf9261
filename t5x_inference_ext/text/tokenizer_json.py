"""tokenizer.json files (the format of the library `tokenizers`) as vocabularies."""

from collections.abc import Mapping, Sequence
import functools
import json
from typing import Any

from t5x_inference_ext.errors import RequestError, printable
from t5x_inference_ext.text.vocabulary import SPACE_SIGN, Vocabulary

TOKENIZER_FILE = 'tokenizer.json'
MAX_BYTES = 256 * 2**20  # the largest known file has 33 MB


class TokenizerVocabulary(Vocabulary):
  """A tokenizer.json.

  Tokens are decoded by their bytes. In a run of byte tokens that is not UTF-8, only the wrong bytes
  become U+FFFD; the library's own decoder would replace the whole run.

  Args:
    name: Name for messages, such as the file's path.
    data: Content of the file.
    bos_id: The id that is put in front of a prompt; None: none is.
    end_ids: The ids that end a row.

  Raises:
    RequestError: The data is not a tokenizer, or its tokens can't be decoded one by one.
  """

  kind = 'tokenizer.json'

  def __init__(
    self, name: str, data: bytes, bos_id: int | None = None, end_ids: Sequence[int] = ()
  ) -> None:
    self.name, self._data, self.bos_id, self.end_ids = name, data, bos_id, tuple(end_ids)
    self._byte_level = self._byte_fallback = self._spaces = False
    decoder = self._tokenizer.decoder
    # The decoder's state is the section `decoder` of the file.
    state = None if decoder is None else json.loads(decoder.__getstate__())
    try:
      self._read_decoder(state)
    except (KeyError, TypeError, AttributeError) as error:
      raise RequestError(
        f'{printable(name)} has a decoder that is not known, {printable(str(state), 80)}: known '
        'are ByteLevel, Metaspace, and sequences of Replace, ByteFallback, Fuse and Strip as in '
        'Llama'
      ) from error

  def __getstate__(self) -> dict[str, Any]:
    return {name: v for name, v in self.__dict__.items() if name not in ('_tokenizer', '_special')}

  @functools.cached_property
  def _tokenizer(self) -> Any:
    import tokenizers  # needed by few runs

    try:
      if len(self._data) > MAX_BYTES:
        raise ValueError(f'it has more than {MAX_BYTES // 2**20} MiB')
      tokenizer = tokenizers.Tokenizer.from_str(self._data.decode())
    except BaseException as error:
      # If the library panics, it raises a BaseException.
      if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
        raise
      raise RequestError(
        f'{printable(self.name)} is not a tokenizer.json that can be used: {printable(str(error))}'
      ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer

  @functools.cached_property
  def _special(self) -> frozenset[int]:
    added = self._tokenizer.get_added_tokens_decoder()
    return frozenset(token for token, content in added.items() if content.special)

  @functools.cached_property
  def size(self) -> int:
    """One more than the largest id."""
    return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

  def token_id(self, token: str) -> int | None:
    """Return the id of a token, or None if there is no such token."""
    return self._tokenizer.token_to_id(token)

  @property
  def own_bos_id(self) -> int | None:
    """The id that the tokenizer's post-processor puts in front of a text; None if it puts none."""
    with_specials, without = (
      self._tokenizer.encode('a', add_special_tokens=special).ids for special in (True, False)
    )
    front = with_specials[: len(with_specials) - len(without)]
    return front[0] if front and with_specials[len(front) :] == without else None

  def encode(self, text: str) -> list[int]:
    """Return the ids of a text, without BOS and EOS. Names of special tokens become their ids.

    Raises:
      UnicodeEncodeError: The text has a lone surrogate.
    """
    text.encode('utf-8')
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def piece(self, token: int, special: bool = False) -> bytes:
    """Return the bytes of a token."""
    content = self._tokenizer.id_to_token(token) if 0 <= token < 2**32 else None
    if content is None or (token in self._special and not special):
      return b''
    if self._byte_level:
      try:
        return bytes(map(byte_of_character().__getitem__, content))
      except KeyError:
        return content.encode()
    if self._byte_fallback and len(content) == 6 and content.startswith('<0x'):
      try:
        return bytes([int(content[3:5], 16)])
      except ValueError:
        pass
    return (content.replace(SPACE_SIGN, ' ') if self._spaces else content).encode()

  def files(self) -> Mapping[str, bytes]:
    """Return the tokenizer.json."""
    return {TOKENIZER_FILE: self._data}

  def _read_decoder(self, state: Mapping[str, Any] | None) -> None:
    """Set how tokens become bytes; raise KeyError or TypeError for an unknown decoder."""
    if state is None:
      raise KeyError('none')
    parts = state['decoders'] if state['type'] == 'Sequence' else [state]
    fused = len(parts) == 1
    for part in parts:
      kind = part['type']
      if kind == 'ByteLevel':
        self._byte_level = True
      elif kind == 'ByteFallback':
        self._byte_fallback = True
      elif kind == 'Fuse':
        fused = True
      elif kind == 'Metaspace' and part['replacement'] == SPACE_SIGN:
        self._spaces = True
        never = part.get('prepend_scheme') == 'never' or part.get('add_prefix_space') is False
        self.leading_spaces = 0 if never else 1
      elif kind == 'Replace' and (part['pattern'], part['content']) == (
        {'String': SPACE_SIGN},
        ' ',
      ):
        self._spaces = True
      elif kind == 'Strip' and fused and (part['content'], part['stop']) == (' ', 0):
        self.leading_spaces = int(part['start'])
      else:
        raise KeyError(kind)


@functools.cache
def byte_of_character() -> dict[str, int]:
  """Map each character of a byte-level token to the byte that it stands for, as in GPT-2.

  Printable characters of Latin-1 stand for themselves, other bytes for characters from U+0100 on.
  """
  printable_bytes = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable_bytes]
  return {
    **{chr(byte): byte for byte in printable_bytes},
    **{chr(256 + i): byte for i, byte in enumerate(others)},
  }
