"""The record of a conversion, which is stored in the checkpoint that it makes."""

import contextlib
import dataclasses
from typing import Any
import zlib

from t5x_inference_ext import __version__
from t5x_inference_ext.checkpoints import storage
from t5x_inference_ext.checkpoints.checkpoint import TREES, Checkpoint
from t5x_inference_ext.errors import CheckpointError

_INDEX_FILES = (
  'checkpoint',
  'serving_config.json',
  'checksums.json',
  '_METADATA',
  'manifest.ocdbt',
  'state/_METADATA',
  'state/manifest.ocdbt',
  'state/checkpoint',
)


def conversion_record(source: Checkpoint, scale_search: str) -> dict[str, Any]:
  """Return the manifest's record of the program, the source and the options."""
  rescaled = source.conventions.get('rescale_logits')
  return {
    'written_by': f't5x_inference_ext {__version__}',
    'source': {
      'path': source.path,
      'format': source.format,
      'step': source.step,
      'notes': list(source.notes),
      'form': source.form,
      'conventions': {
        name: dataclasses.asdict(stated) for name, stated in source.conventions.items()
      },
      'module_map': None if source.module_map is None else source.module_map.to_dict(),
      'rescale_logits': rescaled.value if rescaled and source.format in TREES else None,
      'index_crc32': _index_checksum(source.path)
      if source.index_crc32 is None
      else source.index_crc32,
    },
    'text': {
      **source.text.to_dict(),
      'crc32': {name: zlib.crc32(data) for name, data in source.text.files.items()},
    },
    'options': {'scale_search': scale_search},
  }


def _index_checksum(path: str) -> int:
  """Return the CRC-32 of a checkpoint's small files, which identifies the checkpoint."""
  total = 0
  for name in _INDEX_FILES:
    with contextlib.suppress(CheckpointError):
      total = zlib.crc32(storage.read_file(path, name) or b'', total)
  return total
