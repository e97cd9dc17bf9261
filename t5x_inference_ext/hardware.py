"""The accelerators that programs are planned for: the rates, memory and network of one chip.

FLOP/s and bytes per second are SI (1e12, 1e9); memory is in bytes. TPU v4 is the chip of Pope et
al. (section 4). Properties of the TPU compiler's programs were measured by compiling for each
generation (jax 0.10.2, libtpu 0.0.52).

Network: `link_bandwidth` is one link in one direction. `network_bandwidth` is all links of a chip,
the paper's single number (270 GB/s on v4). Data sheets of TPUs and of NVLink add both directions.
planner/network.py decides which links a collective can use.
"""

import dataclasses

from t5x_inference_ext.errors import UserError

# Columns of a TPU's memory tiles, and an upper bound on their rows. A slice that does not begin at
# a tile boundary is copied before use.
LANES = 128
# Maximum number of attention logits that a chip holds at once (1 GiB in float32). In a pass with
# more, model/attention.py processes the rows in parts. planner/memory.py relies on this.
MAX_ATTENTION_LOGITS = 2**28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One accelerator.

  Attributes:
    name: 'v4', 'A100', ...
    bf16_flops: Peak rate of bfloat16 matrix products, FLOP/s.
    int8_ops: Peak rate of int8 matrix products, operations per second.
    hbm_bytes: Size of the memory in bytes.
    hbm_bandwidth: Bytes per second between memory and chip.
    int4_load_bytes: Bytes whose reading takes as long as a product of few rows takes for each int4
      weight. 1 on v4, where XLA unpacks int4 as slowly as it reads int8 (docs/precompile.md).
    compiler_hbm_bytes: Bytes that the TPU compiler lets a program use, from its out-of-memory
      message; None for GPUs.
    cores: Number of cores that one program uses at once.
    torus: Number of physical axes of the network; 0 for chips connected by a switch.
    links: Number of torus links of a chip.
    link_bandwidth: Bytes per second in one direction: over one torus link; for GPUs, over all
      NVLink links together.
    hop_latency: Seconds that a message takes from a chip to its neighbour. Measured on v4 as about
      1 us; assumed for the other TPUs. For GPUs, a step over NVLink in NCCL's tuning table.
    collective_latency: Seconds that a collective takes in addition to its bytes and hops. About 3
      us on v4 and v5e (precompile/calibration.py); assumed for the other TPUs. For GPUs, the base
      latency in NCCL's tuning table.
    operation_latency: Seconds that the TPU compiler estimates for a small operation of a decode
      step, on average; 0 for GPUs. Measured programs take less (precompile/calibration.py).
    clock_hz: Rate of the cycles in the compiler's estimates; None if no compiler estimates cycles.
    matrix_rows: Rows of the matrix unit. A matmul with fewer rows of activations takes as long as
      one with this many, because a systolic array takes one cycle per row to load a tile of
      weights. For GPU tensor cores it is the side of a tile, 8.
    node: Number of GPUs in a node, connected by NVLink; 0 for TPUs.
    node_bandwidth: Bytes per second in one direction, from each chip to chips of other nodes; 0 for
      TPUs.
    node_latency: Seconds of a step between nodes, in NCCL's tuning table; 0 for TPUs.
    layer_latency: Seconds per layer that the host takes to launch a layer's kernels; 0 for TPUs,
      which run a whole program at once. See GPU_LAYER_LATENCY.
    source: Publication of the numbers.
  """

  name: str
  bf16_flops: float
  int8_ops: float
  hbm_bytes: float
  hbm_bandwidth: float
  int4_load_bytes: float = 0.5
  compiler_hbm_bytes: float | None = None
  cores: int = 1
  torus: int = 0
  links: int = 0
  link_bandwidth: float
  hop_latency: float = 1e-6
  collective_latency: float = 3e-6
  operation_latency: float = 0
  clock_hz: float | None = None
  matrix_rows: int
  node: int = 0
  node_bandwidth: float = 0
  node_latency: float = 0
  layer_latency: float = 0
  source: str

  @property
  def network_bandwidth(self) -> float:
    """Bytes per second in one direction over all links; the paper's bandwidth of a collective."""
    return self.link_bandwidth * max(self.links, 1)

  @property
  def usable_bytes(self) -> float:
    """Bytes of memory that a program may use: compiler_hbm_bytes, or else 90% of the memory."""
    return self.compiler_hbm_bytes or 0.9 * self.hbm_bytes


_GIB = 2**30

# Seconds per layer of a GPU's program that neither bytes, FLOPs nor collectives explain: launches
# of kernels. Fitted to FasterTransformer's times with tensor parallelism of 16
# (benchmarks/planner_fit.py).
GPU_LAYER_LATENCY = 148e-6
# Latencies of NCCL's LL128 protocol over trees: of a collective, of a step over NVLink, of a step
# between nodes. From baseLat and hwLat in src/graph/tuning.cc of NCCL 2.18.1 (2023). Earlier
# versions have 4.4, 1.2 and 8.5 us; GPU_LAYER_LATENCY is fitted beside them.
_NCCL, _NVLINK_STEP, _NODE_STEP = 14e-6, 1.25e-6, 8.5e-6

# Clocks: peak bf16 FLOP/s divided by the matrix units' FLOPs per cycle. That number is the next
# power of two above the best rate that the compiler estimates for a bf16 product of [n, n] by [n,
# n], n = 4096, 8192, 16384:
#
#         estimated    matrix units                           FLOPs      clock
#         per cycle                                           per cycle
#   v4    245,619      2 cores x 4 units x 128 x 128 x 2      262,144    1.05 GHz
#   v5e   126,898      1 core  x 4 units x 128 x 128 x 2      131,072    1.50 GHz
#   v5p   252,216      2 cores x 4 units x 128 x 128 x 2      262,144    1.75 GHz
#   v6e   455,675      1 core  x 4 units x 256 x 256 x 2      524,288    1.75 GHz
_CHIPS = (
  # int8 runs at the bf16 rate.
  Chip(
    name='v4',
    bf16_flops=275e12,
    int8_ops=275e12,
    hbm_bytes=32 * _GIB,
    hbm_bandwidth=1200e9,
    int4_load_bytes=1.0,
    compiler_hbm_bytes=30.75 * _GIB,
    cores=2,
    torus=3,
    links=6,
    link_bandwidth=45e9,
    operation_latency=0.66e-6,
    clock_hz=1.05e9,
    matrix_rows=128,
    source=(
      'Pope et al. 2022, section 4: 275 TFLOP/s, 32 GiB at 1200 GB/s, 270 GB/s of network one way'
    ),
  ),
  Chip(
    name='v5e',
    bf16_flops=197e12,
    int8_ops=394e12,
    hbm_bytes=16e9,
    hbm_bandwidth=819e9,
    compiler_hbm_bytes=15.75 * _GIB,
    torus=2,
    links=4,
    link_bandwidth=45e9,
    operation_latency=0.98e-6,
    clock_hz=1.50e9,
    matrix_rows=128,
    source=(
      'cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 394 TOP/s, 16 GB at 819 GB/s, 400 GB/s of '
      'network both ways'
    ),
  ),
  # hbm_bandwidth: 2765 GB/s in the documentation, rounded.
  Chip(
    name='v5p',
    bf16_flops=459e12,
    int8_ops=918e12,
    hbm_bytes=96e9,
    hbm_bandwidth=2800e9,
    compiler_hbm_bytes=95.73 * _GIB,
    cores=2,
    torus=3,
    links=6,
    link_bandwidth=90e9,
    operation_latency=0.89e-6,
    clock_hz=1.75e9,
    matrix_rows=128,
    source=(
      'cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 918 TOP/s, 95 GB at 2765 GB/s, 1200 GB/s of '
      'network both ways'
    ),
  ),
  Chip(
    name='v6e',
    bf16_flops=920e12,
    int8_ops=1840e12,
    hbm_bytes=32e9,
    hbm_bandwidth=1600e9,
    compiler_hbm_bytes=31.24 * _GIB,
    torus=2,
    links=4,
    link_bandwidth=90e9,
    operation_latency=0.82e-6,
    clock_hz=1.75e9,
    matrix_rows=256,
    source=(
      'cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 1836 TOP/s, 32 GB at 1600 GB/s, 800 GB/s of '
      'network both ways'
    ),
  ),
  # SXM boards, dense rates. NVLink: 600 and 900 GB/s in both directions together. Nodes of 8 (DGX)
  # with one network card per chip.
  Chip(
    name='A100',
    bf16_flops=312e12,
    int8_ops=624e12,
    hbm_bytes=80e9,
    hbm_bandwidth=2039e9,
    link_bandwidth=300e9,
    matrix_rows=8,
    node=8,
    node_bandwidth=25e9,
    layer_latency=GPU_LAYER_LATENCY,
    collective_latency=_NCCL,
    hop_latency=_NVLINK_STEP,
    node_latency=_NODE_STEP,
    source=(
      'NVIDIA A100 and DGX A100 data sheets: 312 TFLOP/s, 80 GB at 2039 GB/s, NVLink 600 GB/s, '
      '8 cards of 200 Gb/s'
    ),
  ),
  Chip(
    name='H100',
    bf16_flops=990e12,
    int8_ops=1980e12,
    hbm_bytes=80e9,
    hbm_bandwidth=3350e9,
    link_bandwidth=450e9,
    matrix_rows=8,
    node=8,
    node_bandwidth=50e9,
    layer_latency=GPU_LAYER_LATENCY,
    collective_latency=_NCCL,
    hop_latency=_NVLINK_STEP,
    node_latency=_NODE_STEP,
    source=(
      'NVIDIA H100 and DGX H100 data sheets: 990 TFLOP/s, 80 GB at 3350 GB/s, NVLink 900 GB/s, '
      '8 cards of 400 Gb/s'
    ),
  ),
  Chip(
    name='H200',
    bf16_flops=990e12,
    int8_ops=1980e12,
    hbm_bytes=141e9,
    hbm_bandwidth=4800e9,
    link_bandwidth=450e9,
    matrix_rows=8,
    node=8,
    node_bandwidth=50e9,
    layer_latency=GPU_LAYER_LATENCY,
    collective_latency=_NCCL,
    hop_latency=_NVLINK_STEP,
    node_latency=_NODE_STEP,
    source=(
      'NVIDIA H200, DGX H200 data sheets: 990 TFLOP/s, 141 GB at 4800 GB/s, NVLink 900 GB/s, 8 '
      'cards of 400 Gb/s'
    ),
  ),
)
CHIPS = {chip.name: chip for chip in _CHIPS}


def chip(name: str) -> Chip:
  """Return the chip with a given name, such as 'v4' for TPU v4.

  Raises:
    UserError: The name is not in CHIPS.
  """
  if name not in CHIPS:
    raise UserError(f'no chip is called {name!r}: there are {", ".join(CHIPS)}')
  return CHIPS[name]
