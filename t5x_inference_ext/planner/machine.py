"""What a plan is for: so many chips of a kind, and how they are joined: a TPU slice, or GPUs in nodes."""

import dataclasses
import math

from t5x_inference_ext import hardware
from t5x_inference_ext.config import ModelConfig
from t5x_inference_ext.errors import MeshError
from t5x_inference_ext.hardware import CHIPS, Chip
from t5x_inference_ext.precompile import slices
from t5x_inference_ext.sharding import torus
from t5x_inference_ext.sharding.layout import check_model
from t5x_inference_ext.sharding.mesh import AXES
from t5x_inference_ext.sharding.mesh import MeshShape as Mesh
from t5x_inference_ext.sharding.mesh_choice import torus_mesh, torus_meshes

_GPUS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclasses.dataclass(frozen=True)
class Machine:
  """So many chips, joined by a torus or by NVLink.

  Attributes:
    chip: each of them.
    shape: of the torus; GPUs are (n, 1, 1).
    wraps: per physical axis, whether its ends are linked.
  """

  chip: Chip
  shape: tuple[int, int, int]
  wraps: tuple[bool, bool, bool]

  @classmethod
  def parse(cls, text: str) -> 'Machine':
    """'v4:4x4x4', 'v5e:4x8' or 'A100:16'.

    Raises:
      MeshError: an unknown chip, or a slice that can't be rented, listing the known.
    """
    kind, colon, sizes = text.partition(':')
    names = {name.lower(): name for name in CHIPS}
    if not colon and text.lower() in names:
      raise MeshError(
        f'{text} is a chip, not a slice of it; known: {", ".join(known_machines(names[text.lower()]))}'
      )
    if kind.lower() not in names and (
      colon or not text[:1].isdecimal()
    ):  # v4 is left out, as in 4x4x4
      raise MeshError(
        f'no chip is called {kind!r}: a slice is written chip:shape, such as v4:4x4x4 or A100:16, with '
        f'chip {", ".join(CHIPS)}'
      )
    chip = hardware.chip(names[kind.lower()]) if colon else None
    if chip is None or chip.torus:
      slice_ = torus.parse_slice(text)
      slices.check_slice(slice_)
      return cls(hardware.chip(slice_.kind), slice_.shape, slice_.wraps)
    if not sizes.isdecimal() or int(sizes) not in _GPUS:
      raise MeshError(
        f'{chip.name}s are written with their number, such as {chip.name}:8; known: '
        f'{", ".join(known_machines(chip.name))}; got {text!r}'
      )
    return cls(chip, (int(sizes), 1, 1), (False,) * 3)

  @property
  def chips(self) -> int:
    return math.prod(self.shape)

  def __str__(self) -> str:
    """As `parse` reads it."""
    if not self.chip.torus:
      return f'{self.chip.name}:{self.chips}'
    return str(torus.TpuSlice(self.chip.name, self.shape))

  def meshes(self, config: ModelConfig, split: bool = True) -> tuple[Mesh, ...]:
    """The meshes (X, Y, Z) that a plan for this model may use, Y no smaller than Z: the other order moves the same.

    On a torus those of mesh_choice.torus_meshes, first that which a slice has where none is asked for. GPUs have no torus:
    any three factors, first those that are best for ws_2d.

    Args:
      config: the model.
      split: whether mesh axes may share a physical axis of the torus.

    Raises:
      MeshError: the chips do not divide the model.
    """
    check_model(config, dict(zip(AXES, (self.chips, 1, 1))))
    if self.chip.torus:
      found = set(torus_meshes(self.shape, self.wraps, split))
      first = torus_mesh(self.shape, self.wraps, config, split)
    else:
      found = {
        (x, y, self.chips // x // y)
        for x in _divisors(self.chips)
        for y in _divisors(self.chips // x)
      }
      found = {m for m in found if m[1] >= m[2]}
      first = min(found, key=lambda m: (_distance(m[0], self.chips, config), m[1]))
    return (first, *sorted(found - {first}))


def known_machines(chip: str) -> list[str]:
  """The usual slices of a chip, smallest first.

  Raises:
    UserError: a chip that is not in hardware.CHIPS.
  """
  if hardware.chip(chip).torus:
    return slices.known_slices(chip)
  return [f'{chip}:{n}' for n in _GPUS]


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def _distance(x: int, chips: int, config: ModelConfig) -> float:
  """How far X is from sqrt(n E / F), where ws_2d moves least."""
  return abs(math.log(x * x * config.d_ff / (chips * config.d_model)))
