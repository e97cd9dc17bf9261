"""The planner's predictions beside published measurements that its fit does not use.

  python -m benchmarks.planner_predictions

First come the other measured points of Pope et al. (arXiv 2211.05102): PaLM 540B at batch 64 with
int8 and bfloat16 weights (from the text), PaLM 62B (Table 3), two prefills of PaLM 540B (Figure 7),
and what a serial block costs (section 3.4). Each latency is checked against
the MFU that the paper prints beside it. The layout is the paper's. The paper does not give the
meshes of its small slices; the mesh here has whole axes, with X nearest to sqrt(n E / F) (section
3.2.2; if two are equally near, the larger). Then comes Megatron 530B beside NVIDIA's
FasterTransformer on A100s with tensor parallelism, for 20, 60 and 128 tokens in and 8 or 20 out: on
the same GPUs in the layout of tensor parallelism (ws_1d/heads), and on 64 TPU v4 in the best
layout.
"""

import dataclasses
import os
import statistics

os.environ['JAX_PLATFORMS'] = 'cpu'  # before jax is imported: nothing is computed here

from benchmarks.planner_table_2 import TABLE_2  # noqa: E402
from t5x_inference_ext.config import preset  # noqa: E402
from t5x_inference_ext.planner import search  # noqa: E402
from t5x_inference_ext.planner.case import PassCase  # noqa: E402
from t5x_inference_ext.planner.choose import choose  # noqa: E402
from t5x_inference_ext.planner.costs import cost, mfu  # noqa: E402
from t5x_inference_ext.planner.machine import Machine  # noqa: E402
from t5x_inference_ext.planner.request import Plan, PlanRequest  # noqa: E402
from t5x_inference_ext.sharding.layout import Layout  # noqa: E402
from t5x_inference_ext.sharding.mesh import parse_mesh  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Measured:
  """A point that the paper measured.

  `latency` is the time, in seconds, of a prefill of 2048 tokens or of one decode step at context
  2048.
  """

  where: str
  model: str
  machine: str
  mesh: str
  phase: str
  batch: int
  layout: str
  weights: str
  latency: float
  mfu: float | None = None

  @property
  def case(self) -> PassCase:
    """The pass that was measured."""
    model, machine = preset(self.model), Machine.parse(self.machine)
    return PassCase(
      model,
      machine,
      parse_mesh(self.mesh),
      Layout.parse(self.layout),
      self.phase,
      self.batch,
      2048 if self.phase == 'prefill' else 1,
      2048,
      self.weights,
    )

  def check(self) -> None:
    """Raise ValueError if the printed latency and MFU contradict each other."""
    case = self.case
    tokens = case.batch * case.length
    if (
      self.mfu
      and abs(mfu(case.config.num_params, tokens, case.machine, self.latency) - self.mfu) > 0.01
    ):
      raise ValueError(f'{self}: the MFU is not that of the latency')


PAPER = (
  Measured('text', 'palm_540b', 'v4:4x4x4', '4x4x4', 'decode', 64, 'ws_2d/batch', 'int8', 0.0285),
  Measured(
    'text', 'palm_540b', 'v4:4x4x4', '4x4x4', 'decode', 64, 'ws_2d/batch', 'bfloat16', 0.0369
  ),
  Measured(
    'Table 3', 'palm_62b', 'v4:2x2x4', '2x4x2', 'prefill', 1, 'ws_2d/heads', 'int8', 0.16, 0.36
  ),
  Measured(
    'Table 3', 'palm_62b', 'v4:2x2x4', '2x4x2', 'decode', 32, 'ws_2d/batch', 'int8', 0.73 / 64, 0.08
  ),
  Measured(
    'Table 3',
    'palm_62b',
    'v4:2x4x4',
    '4x4x2',
    'prefill',
    512,
    'wg_xyz/batch',
    'bfloat16',
    20.2,
    0.73,
  ),
  Measured(
    'Table 3',
    'palm_62b',
    'v4:2x2x2',
    '2x2x2',
    'decode',
    512,
    'ws_2d/batch',
    'bfloat16',
    5.1 / 64,
    0.37,
  ),
  Measured(
    'Figure 7', 'palm_540b', 'v4:4x4x4', '4x4x4', 'prefill', 64, 'ws_2d/batch', 'bfloat16', 20.0
  ),
  Measured(
    'Figure 7', 'palm_540b', 'v4:4x4x4', '4x4x4', 'prefill', 64, 'wg_xyz/batch', 'bfloat16', 28.3
  ),
)
SERIAL_BLOCK = 0.14  # more time of a decode step of 512 rows of PaLM 540B in bfloat16 on 64 chips

# (tokens in, tokens out) -> batch -> milliseconds with tensor parallelism of 16 and of 32, FP16, no
# pipeline: NVIDIA's FasterTransformer, docs/gpt_guide.md, "Performance of Megatron-530B" (8 A100 80
# GB a node, 8 x 200 Gb/s between nodes): 105 layers, 128 heads of 160, vocabulary 51200, as the
# preset megatron_530b.
FASTER_TRANSFORMER = {
  (20, 8): {1: (565, 431), 4: (616, 493), 16: (730, 575), 64: (1191, 942), 256: (3341, 2483)},
  (60, 20): {
    1: (1379, 1037),
    4: (1512, 1198),
    16: (1868, 1454),
    64: (3383, 2646),
    128: (5406, 4099),
  },
  (128, 8): {1: (585, 451), 4: (765, 606), 16: (1377, 1074), 64: (4002, 3114)},
}


def megatron_plan(batch: int, tokens: int, output: int, chips: int) -> Plan:
  """Return the plan of a row of FASTER_TRANSFORMER on A100s with tensor parallelism."""
  request = PlanRequest(preset('megatron_530b'), batch, tokens, output, weights='bfloat16')
  return tensor_parallel(request, Machine.parse(f'A100:{chips}'))


def tensor_parallel(request: PlanRequest, machine: Machine) -> Plan:
  """Return Megatron's plan: d_ff and heads split over all chips, activations summed over them."""
  case = PassCase(
    request.config,
    machine,
    (1, machine.chips, 1),
    Layout.parse('ws_1d/heads'),
    'prefill',
    request.batch,
    request.input_length,
    request.input_length,
    request.weights,
  )
  decode = dataclasses.replace(case, phase='decode', length=1, context=request.mean_context)
  return Plan(request, cost(case), cost(decode))


def paper() -> None:
  """Print the paper's points beside the predictions."""
  print(
    f'{"":12} {"model":10} {"slice":9} {"phase":8} {"batch":>5} {"weights":9} {"layout":13} '
    f'{"measured":>11} {"predicted":>11} {"error":>6} {"best mesh":>22}'
  )
  errors = []
  for point in PAPER:
    point.check()
    case = point.case
    found = cost(case)
    request = PlanRequest(
      case.config, case.batch, 2048 if case.phase == 'prefill' else 2016, 64, weights=case.weights
    )
    best = min(
      (
        c
        for mesh in case.machine.meshes(case.config)
        for c in search.phase_costs(request, case.machine, mesh, case.phase, case.batch)
      ),
      key=lambda c: c.seconds,
    )
    errors.append(found.seconds / point.latency - 1)
    print(
      f'{point.where:12} {point.model:10} {point.machine:9} {case.phase:8} {case.batch:5} '
      f'{case.weights:9} {point.layout:13} {point.latency * 1e3:8.1f} ms '
      f'{found.seconds * 1e3:8.1f} ms {errors[-1]:+6.0%} '
      f'{str(best.case.layout):>12} {best.case.mesh_text:>6} '
      f'{best.seconds / point.latency - 1:+.0%}'
    )
  sizes = sorted(map(abs, errors))
  near = sum(size <= 0.3 for size in sizes)
  print(
    f'median error {statistics.median(sizes):.1%}, largest {sizes[-1]:.0%}, '
    f'{near} of {len(sizes)} within 30%'
  )
  print(f'a serial block: {serial_block():+.0%}, measured {SERIAL_BLOCK:+.0%}')


def serial_block() -> float:
  """Return the share of time that a serial block adds to the decode step of SERIAL_BLOCK."""
  (step,) = (column.case for column in TABLE_2 if (column.phase, column.batch) == ('decode', 512))
  serial = dataclasses.replace(step, config=dataclasses.replace(step.config, block='serial'))
  return cost(serial).seconds / cost(step).seconds - 1


def megatron() -> None:
  """Print FasterTransformer's times beside the predictions."""
  print(
    f'{"in, out":>8} {"batch":>5} {"TP-16":>9} {"predicted":>10} {"error":>6} {"TP-32":>9} '
    f'{"predicted":>10} {"error":>6} {"64 TPU v4, predicted":>22}'
  )
  errors: dict[int, list[float]] = {16: [], 32: []}
  for (tokens, output), rows in FASTER_TRANSFORMER.items():
    for batch, measured in rows.items():
      line = f'{f"{tokens}, {output}":>8} {batch:5}'
      for chips, milliseconds in zip((16, 32), measured):
        plan = megatron_plan(batch, tokens, output, chips)
        found = plan.seconds * 1e3
        errors[chips].append(found / milliseconds - 1)
        line += f' {milliseconds:6} ms {found:7.0f} ms {errors[chips][-1]:+6.0%}'
      tpu = choose(plan.request, [Machine.parse('v4:4x4x4')]).plan
      print(f'{line} {tpu.seconds * 1e3:6.0f} ms  {" and ".join(tpu.layouts)}')
  for chips, note in ((16, 'fitted: the launches of a layer'), (32, 'predicted')):
    sizes = sorted(map(abs, errors[chips]))
    print(
      f'TP-{chips} ({note}): median error {statistics.median(sizes):.0%}, largest {sizes[-1]:.0%}'
    )


if __name__ == '__main__':
  paper()
  print()
  megatron()
