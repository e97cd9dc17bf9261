"""The shares of a chip's peaks that programs reach, fitted to the paper's Table 2 alone.

`python -m benchmarks.planner_fit` computes the numbers; tests/planner/fit_test.py checks that
FITTED repeats them.
"""

import dataclasses

from t5x_inference_ext.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Efficiency:
  """The shares of the peaks that programs reach, each above 0 and at most 1.

  Attributes:
    matmul: Share of the matrix units' FLOP/s, in products.
    memory: Share of the HBM bandwidth, in reading weights and cache.
    network: Share of the links' speed, in collectives (bytes and hops alike).

  Raises:
    RequestError: A share out of its range.
  """

  matmul: float = 1.0
  memory: float = 1.0
  network: float = 1.0

  def __post_init__(self) -> None:
    for name, value in dataclasses.asdict(self).items():
      if not 0 < value <= 1:
        raise RequestError(f'the efficiency {name} must be above 0 and at most 1, got {value!r}')


# The peaks themselves: lower bounds of time, and the paper's formulas as printed.
IDEAL = Efficiency()

# One for each convention of the network: each gives the same bytes another time.
FITTED = {
  'torus': Efficiency(matmul=0.775, memory=0.67, network=0.823),
  'paper': Efficiency(matmul=0.776, memory=0.517, network=0.438),
}
