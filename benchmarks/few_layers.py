"""Estimated times of a compiled program with all layers, from programs with few of them. No TPU."""

import dataclasses
import os
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'  # before jax is imported: nothing is computed here

from t5x_inference_ext.config import preset  # noqa: E402
from t5x_inference_ext.errors import UserError  # noqa: E402
from t5x_inference_ext.precompile.analysis import analyze, extrapolated  # noqa: E402

FEW_LAYERS = 2, 4


@dataclasses.dataclass(frozen=True)
class Times:
  """Estimates of one run of a program, in seconds.

  Attributes:
    serial: Everything in sequence.
    overlapped: Asynchronous operations beside others, as the schedule runs them.
    calibrated: `overlapped`, corrected by what was measured on this kind of chip; None for a chip
      without measurements.
  """

  serial: float
  overlapped: float
  calibrated: float | None


def times(
  model: str,
  weights: str,
  slice_name: str,
  phase: str,
  batch: int,
  context: int,
  layout: str,
  *,
  layers: int | None = None,
  scan_layers: bool = False,
  **fields: Any,
) -> Times:
  """Return the estimates of a program compiled with `layers` layers, by default all of them.

  Args:
    model: Name of a preset.
    weights, phase, batch, context, scan_layers, **fields: See precompile.case.CompileCase.
    slice_name: The slice, such as 'v4:4x4x4'.
    layout: Layout of the phase.

  Raises:
    UserError: The program can't be compiled, or does not fit into memory.
  """
  config = preset(model)
  answer = analyze(
    dataclasses.replace(config, num_layers=layers or config.num_layers),
    weights,
    slice_name,
    phase,
    batch,
    context,
    layout=layout,
    scan_layers=scan_layers,
    **fields,
  )
  if not answer.fits:
    raise UserError(f'{model} {weights} {slice_name} {phase} batch {batch}: does not fit')
  found = answer.compiled[1]
  calibrated = found.calibrated.overlapped_seconds if found.calibrated else None
  return Times(found.serial_seconds, found.overlapped_seconds, calibrated)


def extrapolated_times(model: str, *case: Any, **fields: Any) -> Times:
  """Return the estimates for all layers, extrapolated from programs of FEW_LAYERS unrolled ones.

  Args:
    model: Name of a preset.
    *case, **fields: See `times`.

  Raises:
    UserError: See `times`.
  """
  layers = preset(model).num_layers
  few, more = (times(model, *case, layers=count, **fields) for count in FEW_LAYERS)

  def all_layers(first: float, second: float) -> float:
    return extrapolated(first, second, FEW_LAYERS, layers)

  return Times(
    all_layers(few.serial, more.serial),
    all_layers(few.overlapped, more.overlapped),
    all_layers(few.calibrated, more.calibrated) if few.calibrated and more.calibrated else None,
  )
