"""Models by their names on a hub, which here is a server in this process."""

import hashlib
import http.server
import json
import pathlib
import sys

import numpy as np
import pytest

from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.checkpoints.conversion.verify import verify
from t5x_inference_ext.errors import CheckpointError, UserError
from tests.checkpoints import gguf_families, public_files
from tests.checkpoints.fake_gcs import FakeServer

SHA = '0123456789abcdef0123456789abcdef01234567'


class FakeHub(FakeServer):
  """A hub with one model, me/model, at one revision, until it is closed."""

  def __init__(self, files: dict[str, bytes]) -> None:
    self.files, self.fetched = files, []
    super().__init__(_handler(self))


def _handler(hub: FakeHub) -> type:
  class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
      pass

    def answer(self, status, data=b'', **headers):
      self.send_response(status)
      for name, value in {'Content-Length': len(data), **headers}.items():
        self.send_header(name.replace('_', '-'), str(value))
      self.end_headers()
      if self.command != 'HEAD':
        self.wfile.write(data)

    def do_HEAD(self):
      self.do_GET()

    def do_GET(self):
      path = self.path.partition('?')[0]
      prefix = '/api/models/me/model'
      if path.startswith(prefix):
        revision = path.removeprefix(prefix).removeprefix('/revision/') or 'main'
        if revision.startswith('/tree/'):
          files = [
            {'type': 'file', 'path': n, 'size': len(d), 'oid': '0'} for n, d in hub.files.items()
          ]
          return self.answer(200, json.dumps(files).encode())
        if revision not in ('main', 'v1', SHA):
          return self.answer(404, X_Error_Code='RevisionNotFound')
        info = {'id': 'me/model', 'sha': SHA, 'siblings': [{'rfilename': n} for n in hub.files]}
        return self.answer(200, json.dumps(info).encode(), Content_Type='application/json')
      name = path.removeprefix(f'/me/model/resolve/{SHA}/')
      if name not in hub.files:
        return self.answer(404, X_Error_Code='RepoNotFound')
      data = hub.files[name]
      hub.fetched += [name] if self.command == 'GET' else []
      headers = {'ETag': f'"{hashlib.sha1(data).hexdigest()}"', 'X_Repo_Commit': SHA}
      return self.answer(200, data, **headers)

  return Handler


@pytest.fixture
def hub(tmp_path, monkeypatch, request):
  def start(files):
    hub = FakeHub(files)
    request.addfinalizer(hub.close)
    monkeypatch.setenv('HF_ENDPOINT', hub.url)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('HF_HUB_DISABLE_PROGRESS_BARS', '1')
    return hub

  return start


def model_files(directory: pathlib.Path) -> dict[str, bytes]:
  return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != 'golden.npz'}


def test_a_name(hub, testdata, tmp_path):
  """The revision is resolved once, and recorded; what is not needed is not fetched."""
  source = testdata / 'families' / 'cohere'
  served = hub(
    {**model_files(source), 'pytorch_model.bin': b'x', 'original/model.safetensors': b''}
  )
  found, wanted = open_checkpoint('hf:me/model'), open_checkpoint(source)
  assert found.path == f'hf:me/model@{SHA}' and SHA in found.notes[0]
  assert found.config == wanted.config
  for name, tensor in wanted.tensors.items():
    np.testing.assert_array_equal(found.tensors[name].read(), tensor.read())
  assert sorted(set(served.fetched)) == [
    'config.json',
    'generation_config.json',
    'model.safetensors',
  ]
  convert.convert('hf:me/model@v1', str(tmp_path / 'out'), weights='bfloat16')
  manifest = json.loads((tmp_path / 'out' / 'serving_config.json').read_text())
  assert manifest['source']['path'] == f'hf:me/model@{SHA}'
  assert 'hf:me/model' in verify(str(tmp_path / 'out'), f'hf:me/model@{SHA}')[-1]


def test_a_gguf_file(hub, testdata, tmp_path):
  file = public_files.write_gguf(
    tmp_path / 'a.gguf', *gguf_families.converted(testdata / 'families' / 'qwen2')
  )
  hub({'a.gguf': file.read_bytes()})
  found = open_checkpoint('hf:me/model/a.gguf')
  assert found.path == f'hf:me/model/a.gguf@{SHA}' and found.format == 'gguf'
  with pytest.raises(CheckpointError, match='name one of them, such as hf:me/model/a.gguf'):
    open_checkpoint('hf:me/model')
  with pytest.raises(CheckpointError, match='names no GGUF file of this model; it has a.gguf'):
    open_checkpoint('hf:me/model/b.gguf')


@pytest.mark.parametrize(
  'address,files,words',
  [
    ('hf:me/other', {}, "can't fetch hf:me/other"),
    ('hf:me/model@v9', {}, "can't fetch hf:me/model@v9"),
    ('hf:me/model', {'config.json': b'{}', 'pytorch_model.bin': b''}, 'pickles'),
    ('hf:me/model', {'README.md': b''}, 'neither model.safetensors nor'),
    ('hf:model', {}, 'is not an address on the hub'),
    ('hf:../../etc', {}, 'is not an address on the hub'),
    ('hf:me/model/../../x.gguf', {}, 'is not an address on the hub'),
    ('hf:me/\x1b[31m', {}, '\\x1b'),
  ],
)
def test_what_is_not_there(hub, address, files, words):
  hub(files)
  with pytest.raises(CheckpointError) as caught:
    open_checkpoint(address)
  message = str(caught.value)
  assert words in message and '\n' not in message and '\x1b' not in message


def test_without_a_network(monkeypatch):
  """A closed port of this machine: httpx's errors are none of OSError's."""
  monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')
  with pytest.raises(CheckpointError, match="can't fetch hf:me/model: .*refused"):
    open_checkpoint('hf:me/model')


def test_without_the_library(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  with pytest.raises(UserError, match=r't5x_inference_ext\[hub\]'):
    open_checkpoint('hf:me/model')
