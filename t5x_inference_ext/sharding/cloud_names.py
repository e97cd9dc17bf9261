"""Google Cloud's names of TPU slices: v4-128 is v4:4x4x4.

The number after the dash counts TensorCores. A chip of v4 or v5p has two, a chip of v5e or v6e has
one. Sources: cloud.google.com/tpu/docs/v4, v5p, v5e, v6e, supported-tpu-configurations.
"""

import re

from t5x_inference_ext.errors import MeshError

# Name -> (generation, what the name's number counts per chip). A generation's first name is the
# cloud's own: GKE and many people write v5e for v5litepod.
_NAMES = {
  'v4': ('v4', 2),
  'v5p': ('v5p', 2),
  'v5litepod': ('v5e', 1),
  'v5e': ('v5e', 1),
  'v6e': ('v6e', 1),
}
# Number of chips -> shape of the slice that the cloud creates for that number.
_SHAPES_3D = {
  4: (2, 2, 1),
  8: (2, 2, 2),
  16: (2, 2, 4),
  32: (2, 4, 4),
  64: (4, 4, 4),
  128: (4, 4, 8),
  256: (4, 8, 8),
  512: (8, 8, 8),
  1024: (8, 8, 16),
  2048: (8, 16, 16),
  4096: (16, 16, 16),
}
_SHAPES_2D = {
  1: (1, 1, 1),
  4: (2, 2, 1),
  8: (2, 4, 1),
  16: (4, 4, 1),
  32: (4, 8, 1),
  64: (8, 8, 1),
  128: (8, 16, 1),
  256: (16, 16, 1),
}
_SHAPES = {
  'v4': _SHAPES_3D,
  'v5p': {**_SHAPES_3D, 6144: (16, 16, 24)},
  'v5e': _SHAPES_2D,
  'v6e': _SHAPES_2D,
}


def cloud_slice(text: str) -> tuple[str, tuple[int, int, int]] | None:
  """Return the generation and the shape that a cloud's name stands for; None for other texts.

  Raises:
    MeshError: The name stands for no slice, or for one of several generations.
  """
  match = re.fullmatch(r'([a-z0-9]+)-([0-9]{1,9})', text.strip().lower())
  if match is None:
    return None
  name, number = match[1], int(match[2])
  if name == 'v5':
    raise MeshError(
      f'{text} may be v5p-{number}, which counts two TensorCores a chip, or v5litepod-{number}, '
      'which counts chips: write one of them'
    )
  if name not in _NAMES:
    return None
  kind, each = _NAMES[name]
  chips, rest = divmod(number, each)
  if rest or chips not in _SHAPES[kind]:
    counted = 'two TensorCores a chip' if each == 2 else 'chips'
    known = ', '.join(f'{name}-{each * size}' for size in _SHAPES[kind])
    raise MeshError(f'{text} counts {counted}, and there is no such slice; known: {known}')
  return kind, _SHAPES[kind][chips]


def cloud_name(kind: str, chips: int) -> str:
  """Return the cloud's name for a slice of a generation: 'v4-128' for 64 chips of v4."""
  name, each = next((n, each) for n, (generation, each) in _NAMES.items() if generation == kind)
  return f'{name}-{each * chips}'
