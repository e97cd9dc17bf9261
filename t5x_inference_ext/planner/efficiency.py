"""How far programs stay below the peaks: three efficiencies, fitted to the paper's Table 2 and to nothing else.

`python -m t5x_inference_ext.planner.fit` makes the numbers; tests/planner/fit_test.py checks that these are its.
"""

import dataclasses

from t5x_inference_ext.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Efficiency:
  """The shares of the peaks that programs reach, each above 0 and at most 1.

  Attributes:
    matmul: of the matrix units' FLOP/s, in products.
    memory: of the HBM's bandwidth, in reading weights and cache.
    network: of the speed of links, in collectives (bytes and hops alike).

  Raises:
    RequestError: one out of its range.
  """

  matmul: float = 1.0
  memory: float = 1.0
  network: float = 1.0

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if not 0 < value <= 1:
        raise RequestError(
          f'the efficiency {field.name} must be above 0 and at most 1, got {value!r}'
        )


# Nothing lost: the bounds, and the paper's formulas as they stand.
IDEAL = Efficiency()

# By the network's convention, since the same bytes take other times.
FITTED = {
  'torus': Efficiency(matmul=0.775, memory=0.67, network=0.823),
  'paper': Efficiency(matmul=0.776, memory=0.517, network=0.438),
}
