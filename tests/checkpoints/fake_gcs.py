"""A bucket in memory that speaks as much of Google's JSON API as tensorstore uses, and fails."""

import collections
import http.server
import itertools
import json
import pathlib
import threading
import urllib.parse

# So that listings have several.
PAGE = 5
_numbers = itertools.count()


class FakeServer:
  """A server in a thread of its own, until it is closed."""

  def __init__(self, handler: type):
    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    self.url = f'http://127.0.0.1:{self._server.server_port}'
    self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
    self._thread.start()

  def close(self) -> None:
    self._server.shutdown()
    self._server.server_close()
    self._thread.join()


class FakeGcs(FakeServer):
  """A bucket's server, until it is closed.

  Attributes:
    url: for TENSORSTORE_GCS_HTTP_URL.
    bucket: gs:// and its name, which no other has: tensorstore remembers where a bucket was.
    objects: by name, (generation, value).
    requests: (method, name) of all so far; listings have the name ''.
    failures: by (method, name), the status codes with which the next such requests end.
    store: what becomes of a value that is uploaded.
  """

  def __init__(self):
    self.objects, self.requests, self.failures = {}, [], collections.defaultdict(list)
    self.store = lambda name, value: value
    self._generations, self._lock = itertools.count(1000), threading.Lock()
    name = f'bucket-{next(_numbers)}'
    self.bucket, self.root = f'gs://{name}', f'/storage/v1/b/{name}/o'
    super().__init__(_handler(self))

  def put(self, name: str, value: bytes) -> int:
    with self._lock:
      self.objects[name] = next(self._generations), value
      return self.objects[name][0]

  def put_directory(self, directory: pathlib.Path, name: str) -> str:
    """A directory's files as objects. Returns its address."""
    for file in directory.rglob('*'):
      if file.is_file():
        self.put(f'{name}/{file.relative_to(directory)}', file.read_bytes())
    return f'{self.bucket}/{name}'

  def below(self, name: str) -> dict[str, bytes]:
    """The values of the objects below a directory."""
    return {
      n.removeprefix(f'{name}/'): value
      for n, (_, value) in self.objects.items()
      if n.startswith(f'{name}/')
    }

  def uploads(self) -> list[str]:
    return [name for method, name in self.requests if method == 'POST']


def _handler(gcs: FakeGcs) -> type:
  class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = 'HTTP/1.1'
    wbufsize = 2**16  # an answer in one piece

    def log_message(self, *_):
      pass

    def answer(self, status: int, value: bytes = b'', **headers) -> None:
      self.send_response(status)
      for name, text in headers.items():
        self.send_header(name.replace('_', '-'), str(text))
      if status not in (204, 304):
        self.send_header('Content-Length', str(len(value)))
      self.end_headers()
      self.wfile.write(value)

    def begin(self) -> tuple[str, dict[str, str]] | None:
      """The object's name and the query; None where the answer has been a failure."""
      parts = urllib.parse.urlsplit(self.path)
      query = dict(urllib.parse.parse_qsl(parts.query))
      path = parts.path.removeprefix('/upload')
      name = query.get('name') or urllib.parse.unquote(path.removeprefix(gcs.root).lstrip('/'))
      gcs.requests.append((self.command, name))
      if not path.startswith(gcs.root):
        self.answer(404)
      elif gcs.failures[self.command, name]:
        self.answer(gcs.failures[self.command, name].pop(0), b'the server says no')
      else:
        return name, query
      return None

    def do_GET(self):
      asked = self.begin()
      if asked is None:
        return
      name, query = asked
      if not name:
        self.list(query)
        return
      generation, value = gcs.objects.get(name, (0, None))
      if query.get('ifGenerationNotMatch') == str(generation):
        self.answer(304)
      elif value is None:
        self.answer(404)
      elif query.get('alt') == 'json':
        self.answer(200, json.dumps(_metadata(name)).encode())
      elif (asked_range := self.headers.get('Range')) is not None:
        first, last = asked_range.removeprefix('bytes=').split('-')
        begin = int(first) if first else max(0, len(value) - int(last))
        end = min(len(value), int(last) + 1) if first and last else len(value)
        if begin >= end:
          self.answer(416)
          return
        self.answer(
          206,
          value[begin:end],
          x_goog_generation=generation,
          Content_Range=f'bytes {begin}-{end - 1}/{len(value)}',
        )
      else:
        self.answer(200, value, x_goog_generation=generation)

    def list(self, query: dict[str, str]) -> None:
      begin, end = query.get('startOffset', ''), query.get('endOffset', '\U0010ffff')
      names = [
        n for n in sorted(gcs.objects) if begin <= n < end and n >= query.get('pageToken', '')
      ]
      content = {'items': [_metadata(n) for n in names[:PAGE]]}
      if len(names) > PAGE:
        content['nextPageToken'] = names[PAGE]
      self.answer(200, json.dumps(content).encode())

    def do_POST(self):
      value = self.rfile.read(int(self.headers['Content-Length']))
      asked = self.begin()
      if asked is not None:
        gcs.put(asked[0], gcs.store(asked[0], value))
        self.answer(200, json.dumps(_metadata(asked[0])).encode())

    def do_DELETE(self):
      asked = self.begin()
      if asked is not None:
        self.answer(404 if gcs.objects.pop(asked[0], None) is None else 204)

  def _metadata(name: str) -> dict[str, str]:
    generation, value = gcs.objects[name]
    return {'name': name, 'generation': str(generation), 'size': str(len(value))}

  return Handler
