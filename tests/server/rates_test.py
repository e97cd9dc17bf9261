from t5x_inference_ext.server.rates import MeasuredRate


class Clock:
  def __init__(self):
    self.time = 100.0

  def __call__(self):
    return self.time


def test_counts_the_last_seconds():
  clock = Clock()
  rate = MeasuredRate(clock)
  assert rate.per_second == 0
  for _ in range(40):
    clock.time += 0.5
    rate.add(3)
  assert rate.per_second == 6  # 120 in 20 s
  for _ in range(100):
    clock.time += 0.5
    rate.add(1)
  assert abs(rate.per_second - 2) < 0.1  # what came before is forgotten
  clock.time += 31
  assert rate.per_second == 0


def test_a_young_rate_is_of_one_second_at_least():
  clock = Clock()
  rate = MeasuredRate(clock)
  clock.time += 0.01
  rate.add(5)
  assert rate.per_second == 5
