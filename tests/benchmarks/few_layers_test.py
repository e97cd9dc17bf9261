"""Times of all layers, extrapolated from programs with few."""

import pytest

from benchmarks import few_layers
from benchmarks.few_layers import Times
from t5x_inference_ext.config import preset


def test_times_of_few_layers_are_extrapolated(monkeypatch):
  """A program of 0.2 s and 0.1 s a layer, half of it overlapped, on a chip without calibration."""

  def times(config, *case, **fields):
    return Times(0.2 + 0.1 * config.num_layers, 0.1 + 0.05 * config.num_layers, None)

  monkeypatch.setattr(few_layers, 'times', times)
  found = few_layers.extrapolated_times('palm_540b', 'int8', 'v4:4x4x4')
  layers = preset('palm_540b').num_layers
  assert found.serial == pytest.approx(0.2 + 0.1 * layers)
  assert found.overlapped == pytest.approx(0.1 + 0.05 * layers)
  assert found.calibrated is None
