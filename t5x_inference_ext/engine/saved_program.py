"""Saved programs: compiled on a machine with the compiler, run on one with the chips.

A file has three parts: a line that names the format; a header, one line of JSON (versions, devices,
what was compiled, shapes of the arguments); and the executable as jax serializes it. Loading a file
runs code that is in it, so load only files that you made. A file for other versions, devices or
shapes is refused before its code runs.
"""

from collections.abc import Callable, Iterator, Mapping
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
from t5x_inference_ext.text_files import parse_json

PROGRAM_FORMAT = b't5x_inference_ext executable 3\n'
# Packages whose versions must be equal where an executable is saved and where it is loaded.
VERSIONS = ('jax', 'jaxlib', 'libtpu')
_AGAIN = 'compile it again with this installation'
# Field of a header -> the JSON types that it may have, and their name in messages.
_HEADER: dict[str, tuple[tuple[type, ...], str]] = {
  'jax': ((str,), 'text'),
  'jaxlib': ((str,), 'text'),
  'libtpu': ((str, type(None)), 'text or null'),
  'platform': ((str,), 'text'),
  'device_kind': ((str,), 'text'),
  'mesh': ((dict,), 'an object'),
  'devices': ((list,), 'a list'),
  'description': ((dict,), 'an object'),
  'arguments': ((dict,), 'an object'),
  'bytes': ((int,), 'a whole number'),
  'sha256': ((str,), 'text'),
}


class SavedError(UserError):
  """A saved executable can't be loaded here."""


def save(
  path: str | os.PathLike,
  compiled: jax.stages.Compiled,
  arguments: Any,
  mesh: Mesh,
  description: Mapping[str, Any],
) -> dict[str, Any]:
  """Write an executable. On failure no partial file is left.

  Args:
    path: str or path. The file, replaced if it exists.
    compiled: The executable.
    arguments: tuple of the trees that it was lowered with: arrays, or shapes with shardings.
    mesh: Mesh. The mesh that it was compiled for.
    description: mapping, JSON-ready. Settings that the program was compiled for; `load` compares
      them with the run's settings.

  Returns:
    The header.

  Raises:
    SavedError: The file can't be written.
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
  """Return the header of a file, without running anything in the file.

  Raises:
    SavedError: The file does not exist, was not saved by this package, or has a damaged header.
  """
  return _read(path, payload=False)[0]


def check_header(path: str | os.PathLike, mesh: Mesh, description: Mapping[str, Any]) -> None:
  """Check a file's versions, devices and description, as `load` does, but not shapes or checksum.

  Raises:
    SavedError: The versions, devices or description differ; see `load`.
  """
  _check(path, read_program_header(path), mesh, None, description)


def load(
  path: str | os.PathLike,
  function: Callable[..., Any],
  arguments: Any,
  mesh: Mesh,
  description: Mapping[str, Any],
) -> jax.stages.Compiled:
  """Load an executable onto a mesh, if compiling here would give the same program.

  Args:
    path: str or path. A file written by `save` that you trust: loading it runs code.
    function: The function that was compiled. It is only traced, to get the structure of its result.
    arguments: tuple of the function's arguments, trees of arrays or of shapes with shardings.
    mesh: Mesh. The devices.
    description: mapping. Settings of this run, in the form given to `save`.

  Returns:
    A function of `arguments`.

  Raises:
    SavedError: There is no such file, it is damaged, or it is for other versions, devices, settings
      or shapes. The message names the first difference: its value here, and in the file.
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
  except Exception as e:  # pickle and the runtime raise many types of errors
    reason = ' '.join(str(e).split())
    raise SavedError(
      f'{os.fspath(path)} does not load on {devices[0].device_kind}: {reason}'
    ) from e


def shapes(tree: Any) -> Any:
  """Replace arrays by ShapeDtypeStructs without shardings, for functions that set their own."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jax.dtypes.canonicalize_dtype(x.dtype)), tree
  )


def _here(mesh: Mesh) -> dict[str, Any]:
  """Return this installation's versions and devices, as the fields of a header."""
  devices = mesh.devices.ravel().tolist()
  platform = devices[0].platform
  libtpu = [v for v in map(_version, ('libtpu', 'libtpu-nightly')) if v and platform == 'tpu']
  return {
    'jax': jax.__version__,
    'jaxlib': jaxlib.__version__,
    'libtpu': libtpu[0] if libtpu else None,
    'platform': platform,
    'device_kind': devices[0].device_kind,
    'mesh': dict(mesh.shape),
    'devices': [d.id for d in devices],
  }


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None


def _read(path: str | os.PathLike, payload: bool = True) -> tuple[dict[str, Any], bytes]:
  """Return the header and, if `payload`, the executable's bytes, verified; else empty bytes."""
  name = os.fspath(path)
  try:
    with open(path, 'rb') as f:
      if f.readline(len(PROGRAM_FORMAT)) != PROGRAM_FORMAT:
        raise SavedError(
          f'{name} is not an executable that this version of the package saved: make it with '
          '`python -m t5x_inference_ext.precompile --save=FILE`'
        )
      header = _parse_header(name, f.readline())
      data = f.read() if payload else b''
  except OSError as e:
    raise SavedError(f"can't read the executable {name}: {e.strerror}") from e
  if not payload:
    return header, data
  if len(data) != header['bytes'] or hashlib.sha256(data).hexdigest() != header['sha256']:
    raise SavedError(
      f'{name} is damaged: it should hold an executable of {header["bytes"]} bytes and holds '
      f'{len(data)}, or their checksum differs: copy or save it again'
    )
  return header, data


def _parse_header(name: str, line: bytes) -> dict[str, Any]:
  """Parse a header, and check that every field is present and has the right type."""
  try:
    header = parse_json(line.decode())
  except ValueError as e:
    raise damaged_header(name, 'is not JSON') from e
  if not isinstance(header, dict):
    raise damaged_header(name, 'is not a JSON object')
  for field, (types, expected) in _HEADER.items():
    if field not in header:
      raise damaged_header(name, f'has no {field}')
    if not isinstance(header[field], types):
      raise damaged_header(name, f'has {field} that is not {expected}: {header[field]}')
  return header


def damaged_header(path: str | os.PathLike, problem: str) -> SavedError:
  """Return the error for a damaged header.

  Args:
    path: str or path. The file.
    problem: str. What is wrong, as the predicate of a sentence: 'has no batch'.
  """
  problem = header_text(problem)
  return SavedError(f'the header of {os.fspath(path)} {problem}: it is damaged, save it again')


def _check(
  path: str | os.PathLike,
  header: Mapping[str, Any],
  mesh: Mesh,
  arguments: Any,
  description: Mapping[str, Any],
) -> None:
  """Raise SavedError for the first difference from this run; None for `arguments` skips shapes."""
  here = _here(mesh)
  saved = {field: header_text(header[field]) for field in VERSIONS}
  versions = [(field, f'install {field} {text}, or {_AGAIN}') for field, text in saved.items()]
  saved_mesh = 'x'.join(map(header_text, header['mesh'].values()))
  # The platform is compared first: on a machine without a TPU, "libtpu is missing" would mislead.
  for field, fix in (
    ('platform', _AGAIN),
    *versions,
    ('device_kind', 'compile it for these chips'),
    ('mesh', f'pass its mesh, {saved_mesh}, or {_AGAIN}'),
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


def _refuse(path: str | os.PathLike, what: str, saved: Any, wanted: Any, fix: str) -> NoReturn:
  what, was, here = map(header_text, (what, saved, wanted))
  raise SavedError(f'{os.fspath(path)} was compiled for {what} {was}, and here it is {here}: {fix}')


def header_text(value: Any) -> str:
  """Return a header's value as one line of text, cut after 200 characters."""
  text = str(value)
  return (text if text.isprintable() else ascii(text))[:200]


def refuse_differences(
  path: str | os.PathLike, saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
  """Raise SavedError for the first setting that differs between two descriptions."""
  for field, a, b in _differences(*(json.loads(json.dumps(dict(x))) for x in (saved, wanted))):
    _refuse(path, field, a, b, 'run with the saved value, or compile it for this one')


def _differences(
  saved: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
  """Yield (field, saved value, wanted value) for every difference, also in nested objects."""
  for field in sorted({*saved, *wanted}, key=str):
    a, b = saved.get(field), wanted.get(field)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
      for inner, saved_value, wanted_value in _differences(a, b):
        yield f'{field}.{inner}', saved_value, wanted_value
    elif a != b:
      yield field, a, b


def _signature(arguments: Any) -> dict[str, str]:
  """Map each leaf's path to its type and sharding, as 'bfloat16[64,2048] PartitionSpec(...)'."""
  leaves = jax.tree_util.tree_leaves_with_path(arguments)
  return {
    jax.tree_util.keystr(path): f'{x.dtype}[{",".join(map(str, x.shape))}] {_sharding(x)}'.rstrip()
    for path, x in leaves
  }


def _sharding(x: Any) -> str:
  return '' if x.sharding is None else str(getattr(x.sharding, 'spec', x.sharding))
