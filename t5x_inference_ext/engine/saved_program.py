"""Compiled programs in files: compiled where the compiler is, run where the chips are.

A file is a line that names the format, a line of JSON (versions, devices, what was compiled, what it takes) and the
executable as jax serializes it. Loading an executable runs code: load files of your own making alone. A file is refused
before any of that if it was written by other versions, for other devices or for other shapes than are wanted here.
"""

from collections.abc import Callable, Mapping
import hashlib
import importlib.metadata
import json
import os
from typing import Any, NoReturn

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh
import jaxlib

from t5x_inference_ext.errors import UserError

PROGRAM_FORMAT = b't5x_inference_ext executable 2\n'
# Of a header, what must be installed where it is loaded.
_VERSIONS = ('jax', 'jaxlib', 'libtpu')
_AGAIN = 'compile it again with this installation'


class SavedError(UserError):
  """A saved executable that can't be loaded here."""


def save(
  path: str | os.PathLike,
  compiled: jax.stages.Compiled,
  arguments: Any,
  mesh: Mesh,
  description: Mapping[str, Any],
) -> dict[str, Any]:
  """Writes an executable, whole or not at all.

  Args:
    path: the file, replaced if it exists.
    compiled: the executable.
    arguments: the tuple of trees that it was lowered with: arrays, or shapes with shardings.
    mesh: its devices.
    description: what was compiled, JSON-ready; `load` compares it with what is wanted.

  Returns:
    The header.

  Raises:
    SavedError: the file can't be written.
  """
  payload, _, _ = serialize_executable.serialize(compiled)
  header = {
    **_here(mesh),
    'description': dict(description),
    'arguments': _signature(arguments),
    'bytes': len(payload),
    'sha256': hashlib.sha256(payload).hexdigest(),
  }
  unfinished = f'{os.fspath(path)}.unfinished'
  try:
    with open(unfinished, 'wb') as f:
      f.write(PROGRAM_FORMAT + json.dumps(header).encode() + b'\n' + payload)
    os.replace(unfinished, path)
  except OSError as e:
    raise SavedError(f"can't write the executable {os.fspath(path)}: {e.strerror}") from e
  return header


def read_program_header(path: str | os.PathLike) -> dict[str, Any]:
  """What a file says of itself; nothing in it is run.

  Raises:
    SavedError: no such file, or not an executable that this package saved.
  """
  return _read(path, payload=False)[0]


def check_header(path: str | os.PathLike, mesh: Mesh, description: Mapping[str, Any]) -> None:
  """What `load` checks but for shapes and damage, before anything large is read.

  Raises:
    SavedError: as load.
  """
  _check(path, read_program_header(path), mesh, None, description)


def load(
  path: str | os.PathLike,
  function: Callable[..., Any],
  arguments: Any,
  mesh: Mesh,
  description: Mapping[str, Any],
) -> jax.stages.Compiled:
  """Loads an executable onto a mesh, if it is what would be compiled here.

  Args:
    path: a file of `save`, that you trust: loading it runs code.
    function: what was compiled; traced, not compiled, for the structure of its result.
    arguments: the tuple of trees that it takes: arrays, or shapes with shardings.
    mesh: the devices.
    description: what is wanted, as it was saved.

  Returns:
    A function of these arguments.

  Raises:
    SavedError: no such file, damaged, or of other versions, devices, settings or shapes: naming the first difference,
      here and in the file.
  """
  header, payload = _read(path)
  _check(path, header, mesh, arguments, description)
  devices = mesh.devices.ravel().tolist()
  structure = jax.tree.structure((arguments, {}))
  results = jax.tree.structure(jax.eval_shape(function, *arguments))
  try:
    return serialize_executable.deserialize_and_load(
      payload, structure, results, backend=devices[0].client, execution_devices=devices
    )
  except Exception as e:  # pickle's and the runtime's own errors are of many kinds
    raise SavedError(
      f'{os.fspath(path)} does not load on {devices[0].device_kind}: {" ".join(str(e).split())}'
    ) from e


def shapes(tree: Any) -> Any:
  """Arrays, on a device or not, as ShapeDtypeStructs without shardings: for functions that have their own."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)), tree
  )


def _here(mesh: Mesh) -> dict[str, Any]:
  """Versions and devices."""
  devices = mesh.devices.ravel().tolist()
  libtpu = None
  if devices[0].platform == 'tpu':
    libtpu = next(
      (
        importlib.metadata.version(name)
        for name in ('libtpu', 'libtpu-nightly')
        if _installed(name)
      ),
      None,
    )
  return {
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'libtpu': libtpu,
    'platform': devices[0].platform,
    'device_kind': devices[0].device_kind,
    'mesh': dict(mesh.shape),
    'devices': [d.id for d in devices],
  }


def _installed(name: str) -> bool:
  try:
    importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return False
  return True


def _read(path, payload: bool = True) -> tuple[dict[str, Any], bytes]:
  name = os.fspath(path)
  try:
    with open(path, 'rb') as f:
      if f.readline(len(PROGRAM_FORMAT)) != PROGRAM_FORMAT:
        raise SavedError(
          f'{name} is not an executable that this version of the package saved: make it with '
          '`python -m t5x_inference_ext.precompile --save=FILE`'
        )
      try:
        header = json.loads(f.readline())
      except ValueError as e:
        raise SavedError(f'the header of {name} is damaged: save it again') from e
      data = f.read() if payload else b''
  except OSError as e:
    raise SavedError(f"can't read the executable {name}: {e.strerror}") from e
  if payload and (
    len(data) != header['bytes'] or hashlib.sha256(data).hexdigest() != header['sha256']
  ):
    raise SavedError(
      f'{name} is damaged: it has {len(data)} bytes of an executable of {header["bytes"]}, or other '
      'ones: copy or save it again'
    )
  return header, data


def _check(path, header, mesh, arguments, description) -> None:
  """Raises SavedError for the first thing that differs."""
  here = _here(mesh)
  versions = [(field, f'install {field} {header[field]}, or {_AGAIN}') for field in _VERSIONS]
  # The platform first: where it is another there may be no libtpu, and that is not what is wrong.
  for field, fix in (
    ('platform', _AGAIN),
    *versions,
    ('device_kind', 'compile it for these chips'),
    ('mesh', f'pass its mesh, {"x".join(map(str, header["mesh"].values()))}, or {_AGAIN}'),
    (
      'devices',
      'the chips have other numbers, or another order, than in the slice it was compiled for',
    ),
  ):
    if header[field] != here[field]:
      _refuse(path, field.replace('_', ' '), header[field], here[field], fix)
  refuse_differences(path, header['description'], description)
  if arguments is not None:
    for field, a, b in _differences(header['arguments'], _signature(arguments)):
      _refuse(path, f'the argument {field} as', a, b, _AGAIN)


def _refuse(path, what, saved, wanted, fix) -> NoReturn:
  raise SavedError(
    f'{os.fspath(path)} was compiled for {what} {saved}, and here it is {wanted}: {fix}'
  )


def refuse_differences(
  path: str | os.PathLike, saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  """Raises SavedError for the first setting of two descriptions that differs."""
  for field, a, b in _differences(*(json.loads(json.dumps(dict(x))) for x in (saved, wanted))):
    _refuse(path, field, a, b, 'run with the same, or compile it for this')


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]):
  for field in sorted({*saved, *wanted}, key=str):
    a, b = saved.get(field), wanted.get(field)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      yield from ((f'{field}.{inner}', *values) for inner, *values in _differences(a, b))
    elif a != b:
      yield field, a, b


def _signature(arguments: Any) -> dict[str, str]:
  """Path of a leaf -> 'bfloat16[64,2048] PartitionSpec(...)'."""
  leaves = jax.tree_util.tree_leaves_with_path(arguments)
  return {
    jax.tree_util.keystr(path): f'{x.dtype}[{",".join(map(str, x.shape))}] {_sharding(x)}'.rstrip()
    for path, x in leaves
  }


def _sharding(x: Any) -> str:
  return '' if x.sharding is None else str(getattr(x.sharding, 'spec', x.sharding))
