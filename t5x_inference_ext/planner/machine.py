"""The machine of a plan: chips of one kind, connected as a TPU slice or as GPU nodes."""

import dataclasses
import math

from t5x_inference_ext import hardware
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.hardware import CHIPS, Chip
from t5x_inference_ext.precompile import slices
from t5x_inference_ext.sharding import torus
from t5x_inference_ext.sharding.cloud_names import cloud_slice
from t5x_inference_ext.sharding.layout import check_model
from t5x_inference_ext.sharding.mesh import AXES
from t5x_inference_ext.sharding.mesh import MeshShape as Mesh
from t5x_inference_ext.sharding.mesh_choice import torus_mesh, torus_meshes

_GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Machine:
  """Chips of one kind, connected by a torus or by NVLink.

  Attributes:
    chip: The kind of chip.
    shape: Chips along each physical axis of the torus; (n, 1, 1) for n GPUs.
    wraps: For each physical axis, whether its ends are linked.
  """

  chip: Chip
  shape: tuple[int, int, int]
  wraps: tuple[bool, bool, bool]

  @classmethod
  def parse(cls, text: str) -> 'Machine':
    """Return the machine of 'v4:4x4x4', 'v4-128', 'v5e:4x8', 'A100:16', or '4x4x4' (v4).

    Raises:
      MeshError: The chip is unknown, or the slice can't be rented. The message lists known ones.
    """
    if cloud_slice(text) is not None:
      return cls._of(torus.parse_slice(text))
    kind, colon, size = text.partition(':')
    names = {name.lower(): name for name in CHIPS}
    known = kind.lower() in names
    if not colon and known:
      raise MeshError(f'{text} is a chip, not a slice; known slices: {_list(names[kind.lower()])}')
    if not known and (colon or not text[:1].isdecimal()):
      raise MeshError(
        f'no chip is called {kind!r}: a slice is written chip:shape, such as v4:4x4x4 or A100:16, '
        f'with chip {", ".join(CHIPS)}'
      )
    chip = hardware.chip(names[kind.lower()]) if known else None
    if chip is None or chip.torus:
      return cls._of(torus.parse_slice(text))
    if size not in map(str, _GPU_COUNTS):
      raise MeshError(
        f'{chip.name}s are written with their number, such as {chip.name}:8; known: '
        f'{_list(chip.name)}; got {text!r}'
      )
    return cls(chip, (int(size), 1, 1), (False, False, False))

  @classmethod
  def _of(cls, slice_: torus.TpuSlice) -> 'Machine':
    slices.check_slice(slice_)
    return cls(hardware.chip(slice_.kind), slice_.shape, slice_.wraps)

  @property
  def chips(self) -> int:
    """The number of chips."""
    return math.prod(self.shape)

  def __str__(self) -> str:
    """Return the machine's name, which `parse` reads."""
    if not self.chip.torus:
      return f'{self.chip.name}:{self.chips}'
    return str(torus.TpuSlice(self.chip.name, self.shape))

  def meshes(self, config: ModelConfig, split: bool = True) -> tuple[Mesh, ...]:
    """Return the candidate meshes (X, Y, Z) for a model, with the default mesh first.

    Y is at least Z, since swapping the two moves equally many bytes. On a torus the candidates are
    those of mesh_choice.torus_meshes. GPUs have no torus: any three factors are candidates, best
    for ws_2d first.

    Args:
      config: The model.
      split: Whether mesh axes may share a physical axis of the torus.

    Raises:
      MeshError: The chips do not divide the model.
    """
    check_model(config, dict(zip(AXES, (self.chips, 1, 1))))
    if self.chip.torus:
      found = set(torus_meshes(self.shape, self.wraps, split))
      first = torus_mesh(self.shape, self.wraps, config, split)
    else:
      found = set(_factors(self.chips))
      first = min(found, key=lambda mesh: (_distance(mesh[0], self.chips, config), mesh[1]))
    return (first, *sorted(found - {first}))


def known_machines(chip: str) -> list[str]:
  """Return the names of the usual slices of a chip, smallest first.

  Raises:
    UserError: The chip is not in hardware.CHIPS.
  """
  if hardware.chip(chip).torus:
    return slices.known_slices(chip)
  return [f'{chip}:{n}' for n in _GPU_COUNTS]


def _list(chip: str) -> str:
  return ', '.join(known_machines(chip))


def _factors(n: int) -> list[Mesh]:
  """Return every (X, Y, Z) with X Y Z = n and Y at least Z."""
  divisors = [d for d in range(1, n + 1) if n % d == 0]
  return [
    (x, y, n // (x * y))
    for x in divisors
    for y in divisors
    if n % (x * y) == 0 and y >= n // (x * y)
  ]


def _distance(x: int, chips: int, config: ModelConfig) -> float:
  """Return |log(X / sqrt(n E / F))|: ws_2d moves the fewest bytes where it is 0."""
  return abs(math.log(x * x * config.d_ff / (chips * config.d_model)))
