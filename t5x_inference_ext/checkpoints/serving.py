"""The serving checkpoint: canonical tensors as zarr arrays, with the model's config.

docs/serving_checkpoint.md describes the format.

A serving checkpoint is independent of any mesh, and unpadded. Every chunk belongs to one layer and
has a checksum, which is verified when the chunk is first read.
"""

from collections.abc import Mapping
import json
import math
from typing import Any

import ml_dtypes
import numpy as np

from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.manifest import check_file, check_own_checksum
from t5x_inference_ext.checkpoints.readers import zarr_arrays
from t5x_inference_ext.checkpoints.serving_tensor import CHECKSUMS, PackedTensorRows, ServingTensor
from t5x_inference_ext.checkpoints.tensor import Tensor
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import CheckpointError, printable
from t5x_inference_ext.quantization.formats import SERVED_WEIGHTS, stored_size, weight_format
from t5x_inference_ext.quantization.nibbles import packed_shape
from t5x_inference_ext.text.settings import TextSettings, assumed_settings, unknown_vocabulary
from t5x_inference_ext.text_files import load_json

CONFIG = 'serving_config.json'
SERVING_FORMAT = 't5x_inference_ext serving checkpoint'
# Formats of sources that are public models.
PUBLIC_FORMATS = ('safetensors', 'gguf')
# Version 2 added text settings, and the header's checksum of itself.
VERSION = 2

# Maximum sides of a chunk; its rows are halved further, until it has at most MAX_CHUNK_BYTES. With
# small chunks, a shard of a matrix reads little beyond its share, and a conversion can hold all
# rows of one column of chunks in memory.
MAX_CHUNK_ROWS = 8192
MAX_CHUNK_COLUMNS = 4096
MAX_CHUNK_BYTES = 64 * 2**20
# Dtypes of the stored elements.
_DTYPES = {
  'int8': np.dtype(np.int8),
  'int4': np.dtype(np.uint8),  # two values to a byte
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float32': np.dtype(np.float32),
}

# Shape and dtype name of each tensor, by name.
Listed = dict[str, tuple[tuple[int, ...], str]]


def serving_tensors(config: ModelConfig, weights: str) -> Listed:
  """Return the shape and dtype name of every tensor in a model's serving checkpoint, by name.

  Args:
    config: The model.
    weights: Format of the weights (quantization.formats).
  """
  found = weight_format(weights)
  tensors = {**params.parameters(config), **params.scales(config, found.scaled)}

  def dtype(name: str, p: params.Parameter) -> str:
    if p.scale is not None:
      return found.dtype(name).name
    return 'bfloat16' if p.kind == 'embedding' else 'float32'

  return {name: (p.shape, dtype(name, p)) for name, p in tensors.items()}


def is_layered(name: str) -> bool:
  """Return whether the first axis of a tensor is the layer axis."""
  return name not in params.OUTSIDE_LAYERS


def serving_chunk_shape(name: str, shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
  """Return the chunk shape of a tensor: one layer, or a tile of one layer.

  Chunks of int4 matrices have an even number of rows: two rows share their bytes.
  """
  sides = list(shape[1:] if is_layered(name) else shape)
  if len(sides) == 2:
    for axis, limit in enumerate((MAX_CHUNK_ROWS, MAX_CHUNK_COLUMNS)):
      while sides[axis] > limit:
        sides[axis] = -(-sides[axis] // 2)
  while sides[0] > 1 and stored_size(math.prod(sides), dtype) > MAX_CHUNK_BYTES:
    sides[0] = -(-sides[0] // 2)
  if dtype == 'int4':
    sides[0] += sides[0] % 2
  return (1, *sides) if is_layered(name) else tuple(sides)


def checksums_file(checksums: dict[str, list[int]]) -> bytes:
  """Return the content of checksums.json for the CRC-32 of each tensor's chunks."""
  return json.dumps(
    {name: [f'{c:08x}' for c in values] for name, values in checksums.items()}
  ).encode()


def read_serving_header(path: str, data: bytes) -> tuple[dict[str, Any], ModelConfig]:
  """Return the header and the model of a serving checkpoint.

  Args:
    path: Directory of the checkpoint.
    data: Content of serving_config.json.

  Raises:
    CheckpointError: The header is damaged, or has an unknown version.
  """
  where = f'{path}/{CONFIG}'
  header = load_json(data, where)
  try:
    if header['format'] != SERVING_FORMAT:
      raise CheckpointError(
        f'{where}: format {printable(header["format"], 80)} is not {SERVING_FORMAT!r}'
      )
    if header['version'] not in (1, VERSION):
      raise CheckpointError(
        f'{where}: format version {printable(header["version"], 80)}, but this package reads only '
        f'versions 1 and {VERSION}: written by {printable(header.get("written_by"), 80)}'
      )
    if header['version'] > 1 or 'crc32' in header:  # the earliest headers had no checksum
      check_own_checksum(path, CONFIG, data, header.get('crc32'))
    config = ModelConfig.from_dict(header['model'])
    if str(header['weights']).partition(',')[0] not in SERVED_WEIGHTS:
      raise CheckpointError(
        f'{where}: weights {printable(header["weights"], 80)} are not one of '
        f'{", ".join(SERVED_WEIGHTS)}'
      )
    weight_format(header['weights'])  # raises ValueError
    source = header.get('source')
    return {**header, 'source': source if isinstance(source, dict) else {}}, config
  except CheckpointError:
    raise
  except (ValueError, TypeError, KeyError, RecursionError) as e:
    raise CheckpointError(f'{where} is damaged: {type(e).__name__} {e!s:.300}') from e


def read_text(path: str, header: Mapping[str, Any], rows: int) -> TextSettings:
  """Return a serving checkpoint's text settings.

  Args:
    path: Directory of the checkpoint.
    header: Content of serving_config.json. Version 1 has no text settings: those assumed for T5X
      checkpoints apply. In early headers of version 2 they are null if the vocabulary is unknown.
    rows: V, rows of the model's embedding.

  Raises:
    CheckpointError: The text settings or a file of the vocabulary are damaged.
  """
  if header['version'] == 1:
    return assumed_settings(rows)
  if header.get('text') is None:
    if header['source'].get('format') in PUBLIC_FORMATS:
      lost = 'not recorded, and neither are the end ids: convert again'
      return unknown_vocabulary(source=lost, bos_id=None, end_ids=())
    return unknown_vocabulary(source='not recorded')
  return TextSettings.from_dict(
    header['text'], rows, f'{path}/{CONFIG}', lambda name: check_file(path, CONFIG, header, name)
  )


def unpacked(stored: Mapping[str, ServingTensor], listed: Listed) -> dict[str, Tensor]:
  """Return stored arrays as tensors of values, by name: int4 matrices are read from their bytes."""
  return {
    name: PackedTensorRows(tensor, listed[name][0]) if listed[name][1] == 'int4' else tensor
    for name, tensor in stored.items()
  }


def read_listed(
  path: str, listed: Listed, header_file: str, cached: bool = True
) -> dict[str, ServingTensor]:
  """Return the arrays of a directory with checksums.json, by array name.

  Args:
    path: The directory. Each array has its own directory in it, named after it.
    listed: Shape and dtype name of each array, by name. An int4 array is returned as its bytes.
    header_file: Name of the file that lists the arrays, for messages.
    cached: Whether decoded chunks are cached; False reads from the disk each time.

  Raises:
    CheckpointError: An array is missing, or does not have its listed shape and dtype.
  """
  data = storage.read_file(path, CHECKSUMS)
  if data is None:
    raise CheckpointError(f'{path}/{CHECKSUMS} is missing')
  content = load_json(data, f'{path}/{CHECKSUMS}')
  try:
    checksums = {name: [int(c, 16) for c in values] for name, values in content.items()}
  except (ValueError, TypeError, AttributeError, RecursionError) as e:
    raise CheckpointError(f'{path}/{CHECKSUMS} is damaged: {e!s:.200}') from e
  opening = {
    name: zarr_arrays.open_array(printable(name), f'{path}/{name}', cached=cached)
    for name in listed
  }
  tensors = {}
  for name, (shape, dtype) in listed.items():
    store = opening[name].store()
    stored_shape = packed_shape(tuple(shape)) if dtype == 'int4' else tuple(shape)
    if store.shape != stored_shape or store.dtype.numpy_dtype != _DTYPES[dtype]:
      raise CheckpointError(
        f'{name}: {path}/{name} is {store.dtype.name} {list(store.shape)}, but '
        f'{path}/{header_file} says {dtype} {list(shape)}'
      )
    if name not in checksums:
      raise CheckpointError(f'{path}/{CHECKSUMS} lacks {name}')
    tensors[name] = ServingTensor(name, f'{path}/{name}', store, checksums[name])
  return tensors
