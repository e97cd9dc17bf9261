"""A server with the page and canned answers, to test what the page does with them."""

import contextlib
import http.server
import json
import pathlib
import threading
import time

PAGE = pathlib.Path(__file__).resolve().parents[2] / 't5x_inference_ext' / 'server' / 'page'
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; object-src 'none'"
_TYPES = {
  '.html': 'text/html; charset=utf-8',
  '.js': 'text/javascript',
  '.css': 'text/css',
  '.svg': 'image/svg+xml',
}

STATUS = {
  'state': 'ready',
  'model': 'palm_tiny',
  'version': '0.1.0',
  'uptime_seconds': 3723.4,
  'slots': {'used': 3, 'total': 8},
  'waiting': 2,
  'tokens_per_second': 41.5,
  'time_to_first_token_seconds': 0.118,
  'prefixes': {'queries': 40, 'hits': 22},
  'pages': {'used': 24, 'total': 64},
  'mesh': '2x2x2',
  'layouts': {'prefill': 'wg_xyz/batch', 'decode': 'ws_2d/batch'},
  'dtype': 'bfloat16',
  'weights': 'int8',
  'cache': 'int8',
  'max_length': 512,
  'max_logprobs': 5,
  'chat': True,
}
# Text, the tokens of an answer with their log-probabilities, and text that looks like HTML.
TOKENS = [
  ('Paris', -0.02),
  (' is', -0.4),
  (' <b>not</b>', -3.1),
  ('<img src=x onerror="document.title=1">', -5.2),
  (' far', -0.9),
  ('.', -0.001),
]


class StubServer(http.server.ThreadingHTTPServer):
  """Serves the page, and answers every request with `tokens`.

  Attributes:
    bodies: What came, each as (path, JSON body, API key or None).
    failures: For each of the next requests a status, an object to answer with, and headers.
    hold: Cleared, it keeps answers from going on after their first token.
    aborted: Set when a client left before its answer was whole.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.page = {
      '/' if file.name == 'index.html' else f'/{file.name}': (
        _TYPES[file.suffix],
        file.read_bytes(),
      )
      for file in PAGE.iterdir()
    }
    self.status, self.tokens = dict(STATUS), list(TOKENS)
    self.bodies, self.failures = [], []
    self.hold, self.aborted = threading.Event(), threading.Event()
    self.hold.set()

  @property
  def url(self):
    return f'http://127.0.0.1:{self.server_port}/'

  def handle_error(self, request, client_address):
    """Say nothing of clients that leave."""


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *args):
    pass

  def _send(self, status, content_type, data, headers=()):
    self.send_response(status)
    self.send_header('Content-Type', content_type)
    self.send_header('Content-Length', str(len(data)))
    self.send_header('Content-Security-Policy', POLICY)
    for name, value in headers:
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(data)

  def _json(self, status, value, headers=()):
    self._send(status, 'application/json', json.dumps(value).encode(), headers)

  def do_GET(self):
    if self.path == '/status':
      self._json(200, self.server.status)
    elif self.path in self.server.page:
      self._send(200, *self.server.page[self.path])
    else:
      self._json(404, {'error': {'message': 'no such page'}})

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    self.server.bodies.append((self.path, body, self.headers['Authorization']))
    if self.server.failures:
      status, value, headers = self.server.failures.pop(0)
      self._json(status, value, headers)
      return
    self.send_response(200)
    self.send_header('Content-Type', 'text/event-stream')
    self.end_headers()
    try:
      for i, (text, log_prob) in enumerate(self.server.tokens):
        if i:
          self._wait()
        self._event({'choices': [self._choice(text, log_prob)]})
      self._event({'choices': [self._choice('', None, 'stop')]})
      usage = {'choices': [], 'usage': {'completion_tokens': len(self.server.tokens)}}
      self._event(usage | ({'receipt': {'seed': 7}} if body.get('receipt') else {}))
      self.wfile.write(b'data: [DONE]\n\n')
    except OSError:
      self.server.aborted.set()

  def _wait(self):
    while not self.server.hold.wait(0.05):
      self.wfile.write(b': still here\n\n')  # fails once the client has left

  def _choice(self, text, log_prob, finish=None):
    choice = {'index': 0, 'finish_reason': finish}
    others = [(text, log_prob), ('\n', -4.0)]
    if self.path == '/v1/completions':
      logprobs = {'tokens': [text], 'token_logprobs': [log_prob], 'top_logprobs': [dict(others)]}
      choice |= {'text': text}
    else:
      top = [{'token': each, 'logprob': value} for each, value in others]
      logprobs = {'content': [{'token': text, 'logprob': log_prob, 'top_logprobs': top}]}
      choice |= {'delta': {'content': text}}
    return choice | ({} if log_prob is None else {'logprobs': logprobs})

  def _event(self, value):
    self.wfile.write(f'data: {json.dumps(value)}\n\n'.encode())
    time.sleep(0.001)


@contextlib.contextmanager
def serving():
  """Run a StubServer in a thread."""
  with StubServer() as server:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
      yield server
    finally:
      server.hold.set()
      server.shutdown()
      thread.join()
