r"""Kernels and bytes of a decode step or a prefill on one H200, as the GPU compiler makes them.

    pip install --no-deps jax-cuda13-pjrt==VERSION jax-cuda13-plugin==VERSION \
        nvidia-cuda-nvcc nvidia-nvvm
    python -m benchmarks.gpu_compile --shape=palm_8b --weights=bfloat16,int8 --batch=1,8,64

VERSION is jax's. Run from the root of a checkout. No GPU is needed: nothing runs, and nothing is
tuned. (On a device, tuning may choose other kernels for products.) The table shows whether a step
reads its weights and cache once (`times them` near 1: no copies), and how many kernels it starts:
each start takes some time.
"""

import argparse
import dataclasses
import os
import pathlib

# Before jax is imported: the plugin is loaded for its compiler alone.
os.environ.update(JAX_PLATFORMS='cpu', JAX_SKIP_CUDA_CONSTRAINTS_CHECK='1')

import jax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

from benchmarks.accelerator import BATCHES, SHAPES, WEIGHTS  # noqa: E402
from t5x_inference_ext.precompile import loops, work  # noqa: E402
from t5x_inference_ext.precompile.case import CompileCase  # noqa: E402
from t5x_inference_ext.precompile.hlo_parser import parse_hlo  # noqa: E402
from t5x_inference_ext.precompile.program import phase_function  # noqa: E402
from t5x_inference_ext.sharding.mesh import make_mesh  # noqa: E402

# The properties of an H200 that the compiler reads (NVIDIA's data sheet, CUDA's device properties).
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  clock_rate_ghz: 1.98 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H200"
"""


@dataclasses.dataclass(frozen=True)
class Launches:
  """Kernels that one run of a program starts.

  Attributes:
    kernels: int. Number of kernels.
    bytes: int. Bytes that all kernels read and write.
    largest: tuple of (bytes, name). The kernels that move most bytes.
  """

  kernels: int
  bytes: int
  largest: tuple[tuple[int, str], ...]


def launches(text: str, count: int = 3) -> Launches:
  """Count the kernels of a compiled program's text.

  Args:
    text: str. compiled.as_text().
    count: int. Number of kernels in `largest`.
  """
  module = parse_hlo(text)
  found, _ = loops.executed(module)
  runs = [
    (e.times, e.times * work.traffic(module, e.computation, e.instruction), e.instruction.name)
    for e in found
    if not work.is_free(e.instruction)
  ]
  largest = sorted(((moved, name) for _, moved, name in runs), reverse=True)[:count]
  return Launches(
    sum(times for times, _, _ in runs), sum(moved for _, moved, _ in runs), tuple(largest)
  )


def gpu_mesh() -> jax.sharding.Mesh:
  """Return the mesh of one H200 that is not here.

  Raises:
    SystemExit: the plugin is not installed.
  """
  try:
    devices = topologies.get_topology_desc(
      'h200', 'cuda', target_config=_H200, topology='1x1x1'
    ).devices
  except NotImplementedError as e:
    raise SystemExit(
      'jax has no CUDA plugin here: pip install --no-deps jax-cuda13-pjrt==VERSION '
      f'jax-cuda13-plugin==VERSION nvidia-cuda-nvcc nvidia-nvvm (VERSION is {jax.__version__})'
    ) from e
  return make_mesh((1, 1, 1), devices[:1])


def compiler_options() -> dict[str, str]:
  """Return the compiler's options: no tuning on a device, and the path of an assembler.

  The path is needed if CUDA itself is not installed.
  """
  try:
    import nvidia
  except ImportError:
    return {'xla_gpu_autotune_level': '0'}
  folders = [
    folder for root in nvidia.__path__ for folder in sorted(pathlib.Path(root).glob('cu1*'))
  ]
  return {
    'xla_gpu_autotune_level': '0',
    **({'xla_gpu_cuda_data_dir': str(folders[-1])} if folders else {}),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--shape', default='palm_8b', choices=SHAPES)
  parser.add_argument('--phase', default='decode', choices=('decode', 'prefill'))
  parser.add_argument('--weights', default=','.join(WEIGHTS), help='comma separated')
  parser.add_argument(
    '--batch', default=','.join(map(str, BATCHES)), help='batch sizes, comma separated'
  )
  parser.add_argument(
    '--context',
    type=int,
    default=1152,
    help="positions of the cache, and tokens of a prefill's rows",
  )
  parser.add_argument(
    '--scan_layers', action='store_true', help='one loop over all layers instead of code for each'
  )
  args = parser.parse_args()
  mesh, config = gpu_mesh(), SHAPES[args.shape][0]
  print(
    '| weights | batch | kernels | GB read and written | weights and cache, GB | times them '
    '| largest |'
  )
  print('|---|---|---|---|---|---|---|', flush=True)
  for weights in args.weights.split(','):
    for batch in map(int, args.batch.split(',')):
      case = CompileCase(
        config, weights, args.phase, batch, args.context, scan_layers=args.scan_layers
      )
      function, arguments = phase_function(case, mesh)
      compiled = function.lower(*arguments).compile(compiler_options())
      found = launches(compiled.as_text())
      held = compiled.memory_analysis().argument_size_in_bytes
      largest = ', '.join(f'{name} {moved / 1e9:.2f}' for moved, name in found.largest)
      print(
        f'| {weights} | {batch} | {found.kernels} | {found.bytes / 1e9:.2f} | {held / 1e9:.2f} '
        f'| {found.bytes / held:.2f} | {largest} |',
        flush=True,
      )


if __name__ == '__main__':
  main()
