"""Prices of Pallas kernels: the compiler's schedule of bundles, memory, and what a report says."""

import pytest

from t5x_inference_ext import hardware
from t5x_inference_ext.config import preset
from t5x_inference_ext.precompile import kernel_schedule
from t5x_inference_ext.precompile.analysis import analyze
from t5x_inference_ext.precompile.estimate import estimate
from t5x_inference_ext.precompile.kernel_schedule import KernelSchedule, read_schedules
from t5x_inference_ext.precompile.report import report_text
from t5x_inference_ext.precompile.report_json import report_dict
from t5x_inference_ext.sharding.torus import parse_slice

# As the compiler writes them: marks, a loop around bundles, and bundles of several lines.
BUNDLES = """= control target key start
LH: loop header
LB: loop body
     0   :  { %s3_s9 = sld [smem:[#allocation0]] }
   0x1   :  { %14 = vsyncpa [#allocation4], 0 } /* Start region 3 */
   0x2 LB: > { %s29_s14 = sadd.s32 1, %s4361_s13 /* copy for cssa */
 }
   0x3   : > { %4245 = shalt.err (!%p4242_p14) /* BoundsCheck 0
hlo: f.1
 */ }
   0x4 PF: > {} /* End region 2 */
   0x5   :  {}
"""
# A kernel of 84 steps for each of two cores, as compiled.as_text() shows it.
PROGRAM = """HloModule jit_f, num_partitions=1
ENTRY %main (q: bf16[64,256], k: bf16[168,512,256]) -> f32[64,256] {
  %q = bf16[64,256]{1,0} parameter(0)
  %k = bf16[168,512,256]{2,1,0} parameter(1)
  ROOT %context_attention.7 = f32[64,256]{1,0} custom-call(%q, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"parallel":"2",
"steps":"168"
}}, metadata={op_name="jit(f)/context_attention"}
}
"""
MOVED = 64 * 256 * (2 + 4) + 168 * 512 * 256 * 2


def test_bundles_in_and_outside_of_the_loop_are_counted(tmp_path):
  (tmp_path / '17-context_attention.7-01-final_bundles.txt').write_text(BUNDLES)
  (tmp_path / '17-context_attention.9-01-final_bundles.txt').write_text(BUNDLES[:-10])
  (tmp_path / '17-context_attention.7-00-schedule-analysis_final_bundles.txt').write_text('no')
  (tmp_path / '17-TLP-01-final_bundles.txt').write_text(BUNDLES)
  assert read_schedules(tmp_path) == {'context_attention': KernelSchedule(once=3, step=3)}


@pytest.mark.parametrize('kind,cores', [('v4:2x2x1', 2), ('v5e:2x2', 1)])
@pytest.mark.parametrize('step', [10, 10**6])
def test_a_kernel_takes_its_schedule_or_its_memory(kind, cores, step):
  """168 steps, shared by the cores of a chip."""
  slice_, schedule = parse_slice(kind), KernelSchedule(100, step)
  chip = hardware.chip(slice_.kind)
  found = estimate(PROGRAM, slice_, {'x': 4}, schedules={'context_attention': schedule})
  (cost,) = found.costs
  memory = MOVED / (0.85 * chip.hbm_bandwidth)
  assert cost.kernel.schedule_seconds == (100 + step * 168 // cores) / chip.clock_hz
  assert cost.kernel.memory_seconds == pytest.approx(memory)
  assert cost.seconds == pytest.approx(max(memory, cost.kernel.schedule_seconds))
  assert cost.is_priced and (cost.seconds > memory) == (step > 10)


def test_a_kernel_without_a_schedule_is_a_claim():
  (cost,) = estimate(PROGRAM, parse_slice('v4:2x2x1'), {'x': 4}).costs
  assert cost.kernel.schedule_seconds is None and not cost.is_priced
  assert cost.seconds == pytest.approx(MOVED / (0.85 * 1200e9))


@pytest.mark.libtpu
@pytest.mark.parametrize('slice_', ['v4:2x2x1', 'v5e:2x2'])
def test_the_kernel_compiles_and_is_priced(slice_):
  """8B with one layer: the report shows the kernel apart, with its schedule."""
  config = preset('palm_8b', num_layers=1)
  answer = analyze(
    config, 'int8', slice_, 'decode', 8, 1024, layout='ws_2d/batch', attention='kernel'
  )
  (kernel,) = report_dict(answer)['kernels']
  assert kernel['name'] == 'context_attention' and kernel['count'] == 1
  # 8 rows of 1024 positions over 4 chips: 4 MB of keys and values.
  bandwidth = hardware.chip(parse_slice(slice_).kind).hbm_bandwidth
  assert kernel['memory_seconds'] * 0.85 * bandwidth == pytest.approx(
    2 * 2 * 1024 * 256 * 2, rel=0.3
  )
  assert 0.1e-6 < kernel['schedule_seconds'] < 100e-6
  assert 'context_attention 1 x' in report_text(answer) and 'a claim' not in report_text(answer)


@pytest.mark.libtpu
def test_without_the_compilers_files_the_report_says_so(monkeypatch):
  monkeypatch.setattr(kernel_schedule, '_DUMP', '--no_such_flag={}')
  answer = analyze(
    preset('palm_8b', num_layers=1),
    *('int8', 'v4:2x2x1', 'decode', 8, 1024),
    layout='ws_2d/batch',
    attention='kernel',
    cache='int8',
  )
  assert 'schedule not known: a claim' in report_text(answer)
