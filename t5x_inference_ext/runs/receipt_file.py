"""Read receipt files. They may come from anyone, so every field is checked."""

from collections.abc import Sequence
import dataclasses
import math
import re
from typing import Any

from t5x_inference_ext.checkpoints.identity import COVERS, WeightsIdentity
from t5x_inference_ext.engine.inputs import check_seeds
from t5x_inference_ext.engine.request import Request
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.errors import MeshError, RequestError, UserError, name_list
from t5x_inference_ext.model.shardings import CACHE_DTYPES, COMPUTE_DTYPES
from t5x_inference_ext.options import LARGEST_WHOLE, has_type, is_whole, short_repr
from t5x_inference_ext.quantization.formats import weight_format
from t5x_inference_ext.runs.receipt import (
  GRAMMAR_LIBRARY,
  RECEIPT_FORMAT,
  RECEIPT_VERSION,
  TOLD,
  EngineSetting,
)
from t5x_inference_ext.runs.row_sampling import parse_logit_bias
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.mesh import parse_mesh
from t5x_inference_ext.text.grammar import Grammar
from t5x_inference_ext.text.stop_texts import check_stop_texts
from t5x_inference_ext.text_files import parse_json

_MOST_BYTES = 64 * 2**20
_FINISHES = ('eos', 'stop', 'length', 'error')
_VERSIONS = ('t5x_inference_ext', 'jax', 'jaxlib', 'chip')
_TIMES = ('seconds', 'chips', 'chip_seconds')
_OPTIONAL = ('grammar', 'adapter')  # fields of a request
_GRAMMAR = tuple(field.name for field in dataclasses.fields(Grammar))
_PARTS = ('format', 'version', 'request', 'weights', 'engine', 'versions', *_TIMES, 'samples')


@dataclasses.dataclass(frozen=True)
class Receipt:
  """A receipt that was read; see runs/receipt.py.

  Attributes:
    request: The request.
    weights: Dtype of the matrices.
    identity: Identity of the weights.
    setting: Settings of the engine that affect results, such as layouts and dtypes.
    versions: Name of a package or device -> its version.
    samples: Tokens and finish reason of each sample.
    adapter_crc32: CRC-32 of the request's adapter; None without one.
  """

  request: Request
  weights: str
  identity: WeightsIdentity
  setting: EngineSetting
  versions: dict[str, str]
  samples: list[tuple[list[int], str]]
  adapter_crc32: int | None = None


def read_receipt(path: str) -> Receipt:
  """Read a receipt from a file.

  Raises:
    RequestError: The file does not exist or is not a valid receipt. The message names the wrong
      field.
  """
  try:
    with open(path, 'rb') as file:
      data = file.read(_MOST_BYTES + 1)
  except OSError as error:
    raise RequestError(f"the receipt {path} can't be read: {error.strerror}") from error
  if len(data) > _MOST_BYTES:
    raise RequestError(f'{path} is not a receipt: it has more than {_MOST_BYTES} bytes')
  try:
    return _receipt(parse_json(data.decode()))
  except UnicodeDecodeError as error:
    raise RequestError(f'{path} is not a receipt: it is not UTF-8') from error
  except (UserError, ValueError) as error:
    raise RequestError(f'{path} is not a receipt that can be replayed: {error}') from error


def _weights(value: Any) -> str:
  """Return the format of a receipt's weights; raise ValueError if it is none."""
  if not isinstance(value, str):
    raise ValueError(f'weights.dtype is {short_repr(value)}, not a format such as int8')
  try:
    return str(weight_format(value))
  except ValueError as error:
    raise ValueError(f'weights.dtype: {error}') from error


def _receipt(value: Any) -> Receipt:
  """Convert a JSON value to a receipt; raise ValueError if a field is wrong."""
  if isinstance(value, dict) and 'format' in value:
    kind, version = value['format'], value.get('version')
    if (kind, version) != (RECEIPT_FORMAT, RECEIPT_VERSION) or isinstance(version, bool):
      raise ValueError(
        f'format and version are {short_repr(kind)} and {short_repr(version)}, not '
        f'{RECEIPT_FORMAT!r} and {RECEIPT_VERSION}'
      )
  parts = _fields('it', value, _PARTS)
  for name in _TIMES:
    if not has_type(parts[name], float) or not 0 <= parts[name] < math.inf:
      raise ValueError(f'{name} is {short_repr(parts[name])}, not a number of 0 or more')
  request = _request(_fields('request', parts['request'], TOLD, optional=_OPTIONAL))
  versions = _VERSIONS if request.grammar is None else (*_VERSIONS, GRAMMAR_LIBRARY)
  weights = _fields('weights', parts['weights'], ('dtype', *WeightsIdentity._fields))
  digest = weights['sha256']
  if not isinstance(digest, str) or not re.fullmatch('[0-9a-f]{64}', digest):
    raise ValueError(f'weights.sha256 is {short_repr(digest)}, not 64 hexadecimal digits')
  return Receipt(
    request,
    _weights(weights['dtype']),
    WeightsIdentity(_one_of('weights.covers', weights['covers'], COVERS), digest),
    _setting(parts['engine']),
    {
      name: _line(f'versions.{name}', each)
      for name, each in _fields('versions', parts['versions'], versions).items()
    },
    _samples(parts['samples'], request),
    None if request.adapter is None else parts['request']['adapter'][1],
  )


def _request(fields: dict[str, Any]) -> Request:
  tokens, ends = (_ids(f'request.{name}', fields[name]) for name in ('tokens', 'end_ids'))
  seeds, limit, stops = fields['seeds'], fields['limit'], fields['stop_texts']
  if not tokens:
    raise ValueError('request.tokens is empty: there is nothing to continue')
  if not isinstance(seeds, list) or not seeds:
    raise ValueError(f'request.seeds is {short_repr(seeds)}, not a list of seeds')
  check_seeds(seeds)
  if not is_whole(limit) or not 1 <= limit <= LARGEST_WHOLE:
    raise ValueError(f'request.limit is {short_repr(limit)}, not a whole number from 1 on')
  if not isinstance(stops, list):
    raise ValueError(f'request.stop_texts is {short_repr(stops)}, not a list of texts')
  check_stop_texts(stops)
  options = fields['sampling']
  known = tuple(field.name for field in dataclasses.fields(SamplingParams))
  _fields('request.sampling', options, known)
  options = {**options, 'logit_bias': parse_logit_bias(options['logit_bias'])}
  grammar = None
  if 'grammar' in fields:
    grammar = Grammar(**_fields('request.grammar', fields['grammar'], _GRAMMAR))
  return Request(
    tuple(tokens),
    tuple(seeds),
    limit,
    SamplingParams(**options),
    end_ids=tuple(ends),
    stop_texts=tuple(stops),
    grammar=grammar,
    adapter=_adapter(fields['adapter']) if 'adapter' in fields else None,
  )


def _adapter(value: Any) -> str:
  """Return the name of an adapter; raise ValueError if it is not a name and a CRC-32."""
  if not isinstance(value, list) or len(value) != 2 or not is_whole(value[1]):
    raise ValueError(f'request.adapter is {short_repr(value)}, not a name and a CRC-32')
  return _line('request.adapter[0]', value[0])


def _setting(value: Any) -> EngineSetting:
  names = tuple(field.name for field in dataclasses.fields(EngineSetting))
  fields = _fields('engine', value, names)
  setting = EngineSetting(**{name: _line(f'engine.{name}', fields[name]) for name in names})
  _one_of('engine.dtype', setting.dtype, COMPUTE_DTYPES)
  _one_of('engine.cache', setting.cache, CACHE_DTYPES)
  try:
    parse_mesh(setting.mesh)
    Layout.parse(setting.prefill_layout)
    Layout.parse(setting.decode_layout)
  except MeshError as error:
    raise ValueError(f'engine: {error}') from error
  return setting


def _samples(value: Any, request: Request) -> list[tuple[list[int], str]]:
  if not isinstance(value, list) or len(value) != len(request.seeds):
    raise ValueError(f'samples must be a list, one for each of {len(request.seeds)} seeds')
  found = []
  for i, each in enumerate(value):
    where = f'samples[{i}]'
    fields = _fields(where, each, ('tokens', 'score', 'finish_reason'))
    tokens, score = _ids(f'{where}.tokens', fields['tokens']), fields['score']
    if len(tokens) > request.limit:
      raise ValueError(f'{where} has {len(tokens)} tokens, and the limit is {request.limit}')
    if score is not None and not has_type(score, float):
      raise ValueError(f'{where}.score is {short_repr(score)}, not a number')
    finish = _one_of(f'{where}.finish_reason', fields['finish_reason'], _FINISHES)
    found.append((tokens, finish))
  return found


def _fields(
  where: str, value: Any, names: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
  """Return an object that has all of `names` and no others except `optional`.

  Raise ValueError for any other value.
  """
  if not isinstance(value, dict):
    raise ValueError(f'{where} is {short_repr(value)}, not an object with {", ".join(names)}')
  for missing in names:
    if missing not in value and missing not in optional:
      raise ValueError(f'{where} has no {missing!r}')
  unknown = [short_repr(name) for name in value if name not in names]
  if unknown:
    raise ValueError(f'{where} has {name_list(unknown, len(unknown), 3)}, which no receipt has')
  return value


def _ids(where: str, value: Any) -> list[int]:
  if not isinstance(value, list) or not all(is_whole(t) and 0 <= t < 2**31 for t in value):
    raise ValueError(f'{where} is {short_repr(value)}, not a list of token ids')
  return value


def _one_of(where: str, value: Any, choices: Sequence[str]) -> str:
  if not isinstance(value, str) or value not in choices:
    raise ValueError(f'{where} is {short_repr(value)}, not one of {", ".join(choices)}')
  return value


def _line(where: str, value: Any) -> str:
  if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= 100:
    raise ValueError(f'{where} is {short_repr(value)}, not a line of text')
  return value
