"""The shares of a chip's peak rates that programs reach, fitted only to the paper's Table 2.

`python -m benchmarks.planner_fit` computes the numbers; tests/planner/fit_test.py checks that the
result is FITTED.
"""

import dataclasses

from t5x_inference_ext.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Efficiency:
  """The shares of peak rates that programs reach, each above 0 and at most 1.

  Attributes:
    matmul: Share of the matrix units' FLOP/s that products reach.
    memory: Share of the HBM bandwidth that reading of weights and cache, and elementwise
      operations, reach.
    network: Share of the links' speed that collectives reach, for bytes and hops.

  Raises:
    RequestError: A share is out of its range.
  """

  matmul: float = 1.0
  memory: float = 1.0
  network: float = 1.0

  def __post_init__(self) -> None:
    for name, value in dataclasses.asdict(self).items():
      if not 0 < value <= 1:
        raise RequestError(f'the efficiency {name} must be above 0 and at most 1, got {value!r}')


# The peak rates themselves: lower bounds of time, and the paper's formulas as printed.
IDEAL = Efficiency()

# Shares for each network convention: conventions give different times for equal bytes. On the torus
# two numbers are fitted, and links reach their full rate: bytes of collectives take 0.96 of their
# estimated time in measured programs (precompile/calibration.py).
FITTED = {
  'torus': Efficiency(matmul=0.796, memory=0.903, network=1.0),
  'compiled': IDEAL,
  'paper': Efficiency(matmul=0.776, memory=0.517, network=0.438),
}
