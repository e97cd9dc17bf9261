"""Estimated times of a compiled program with all layers, from programs with few of them. No TPU."""

import argparse
from collections.abc import Callable
import dataclasses
import os
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'  # before jax is imported: nothing is computed here

from t5x_inference_ext.config import ModelConfig, preset  # noqa: E402
from t5x_inference_ext.errors import UserError  # noqa: E402
from t5x_inference_ext.precompile.analysis import analyze, extrapolated  # noqa: E402
from t5x_inference_ext.precompile.estimate import Estimate  # noqa: E402
from t5x_inference_ext.quantization.formats import SERVED_WEIGHTS  # noqa: E402

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

  @classmethod
  def of(cls, found: Estimate) -> 'Times':
    """Return the times of an estimate."""
    calibrated = found.calibrated.overlapped_seconds if found.calibrated else None
    return cls(found.serial_seconds, found.overlapped_seconds, calibrated)


def all_layers(config: ModelConfig, times_of: Callable[[ModelConfig], Times]) -> Times:
  """Return the times with all layers, extrapolated from programs with FEW_LAYERS layers.

  Args:
    config: The model.
    times_of: Compiles a program of a model with few layers.
  """
  few, more = (times_of(dataclasses.replace(config, num_layers=layers)) for layers in FEW_LAYERS)

  def whole(first: float, second: float) -> float:
    return extrapolated(first, second, FEW_LAYERS, config.num_layers)

  return Times(
    whole(few.serial, more.serial),
    whole(few.overlapped, more.overlapped),
    whole(few.calibrated, more.calibrated) if few.calibrated and more.calibrated else None,
  )


def times(
  config: ModelConfig,
  weights: str,
  slice_name: str,
  phase: str,
  batch: int,
  context: int,
  layout: str,
  *,
  scan_layers: bool = False,
  **fields: Any,
) -> Times:
  """Compile a program for a slice, and return its times.

  Args:
    config: The model.
    weights, phase, batch, context, scan_layers, **fields: See precompile.case.CompileCase.
    slice_name: The slice, such as 'v4:4x4x4'.
    layout: Layout of the phase.

  Raises:
    UserError: The program can't be compiled, or does not fit into memory.
  """
  answer = analyze(
    config,
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
    raise UserError(f'{weights} {slice_name} {phase} batch {batch}: does not fit')
  return Times.of(answer.compiled[1])


def extrapolated_times(model: str, *case: Any, **fields: Any) -> Times:
  """Return the times of a preset with all layers, unrolled, from few.

  Args:
    model: Name of the preset.
    *case, **fields: See `times`.

  Raises:
    UserError: See `times`.
  """
  return all_layers(preset(model), lambda config: times(config, *case, **fields))


def case_parser(text: str, model: str, slice_name: str) -> argparse.ArgumentParser:
  """Return a parser of the flags that benchmarks of one model on one slice share.

  Args:
    text: What the benchmark does.
    model: Default of --model.
    slice_name: Default of --slice.
  """
  parser = argparse.ArgumentParser(
    description=text, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', default=model)
  parser.add_argument('--weights', default='int8', choices=SERVED_WEIGHTS)
  parser.add_argument('--slice', default=slice_name)
  parser.add_argument('--layout', default='ws_2d/batch')
  return parser
