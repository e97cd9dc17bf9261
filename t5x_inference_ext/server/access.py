"""Access checks of requests: API keys, and allowed names in the Host header."""

from collections.abc import Mapping, Sequence
import hashlib
import hmac
import ipaddress

from t5x_inference_ext.errors import RequestError, printable
from t5x_inference_ext.server.api_errors import ApiError
from t5x_inference_ext.server.options import ServerOptions

_LOCAL_NAMES = ('localhost', '127.0.0.1', '::1')


class Keys:
  """The server's API keys, stored as digests.

  Args:
    keys: The keys. If there are none, every request is accepted.
  """

  def __init__(self, keys: Sequence[str]) -> None:
    self._digests = [_digest(key.encode('utf-8', 'surrogateescape')) for key in keys]

  def client(self, headers: Mapping[str, str]) -> str | None:
    """Return a name for the client, derived from its key; None if the server has no keys.

    The request's key is compared with all keys, by digest, so that the time reveals nothing.

    Raises:
      ApiError: The request has no key, or an unknown one.
    """
    if not self._digests:
      return None
    scheme, _, key = headers.get('authorization', '').partition(' ')
    digest = _digest(key.strip().encode('latin-1', 'replace'))  # headers are decoded as latin-1
    known = [hmac.compare_digest(digest, each) for each in self._digests]
    if scheme.lower() != 'bearer' or not any(known):
      raise ApiError(
        401,
        'this server needs an API key: send authorization: Bearer KEY',
        code='invalid_api_key',
        headers={'www-authenticate': 'Bearer'},
      )
    return f'key {known.index(True)}'


def _digest(key: bytes) -> bytes:
  return hashlib.sha256(key).digest()


def read_keys(options: ServerOptions) -> list[str]:
  """Return the keys that the options give.

  Raises:
    RequestError: The file can't be read, or holds no key.
  """
  keys = [] if options.api_key is None else [options.api_key]
  if options.api_key_file is not None:
    name = options.api_key_file
    try:
      with open(name, encoding='utf-8') as file:
        found = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
      raise RequestError(f"can't read api_key_file {printable(name)}: {error}") from error
    keys += [key for key in found if key and not key.startswith('#')]
    if not keys:
      raise RequestError(f'api_key_file {printable(name)} holds no key: write one key per line')
  if not all(keys):
    raise RequestError('api_key is empty: give a key, or neither --api_key nor --api_key_file')
  return keys


def is_loopback(host: str) -> bool:
  """Return whether an address accepts connections only from this machine."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'


class Hosts:
  """Names that the Host header may have.

  Without this check, a web page could reach a server on a loopback address through a host name that
  it makes resolve to 127.0.0.1 (DNS rebinding).

  Args:
    options: Options with the address and further names.
  """

  def __init__(self, options: ServerOptions) -> None:
    names = options.allowed_host
    if is_loopback(options.host):
      names = (*names, *_LOCAL_NAMES, options.host)
    self._names = {name.lower() for name in names}

  def check(self, header: str) -> None:
    """Raise ApiError for a Host header that is not one of the names."""
    name = header.lower()
    if name.startswith('['):
      name = name[1:].partition(']')[0]
    elif name.count(':') == 1:
      name = name.partition(':')[0]
    if self._names and name not in self._names:
      raise ApiError(
        403,
        f'the Host header {printable(header, 60)!r} is not a name of this server (--allowed_host)',
        code='host_not_allowed',
      )
