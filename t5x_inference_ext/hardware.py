"""The accelerators that programs are planned for: what one chip computes, holds and moves, and where that is said.

FLOP/s and bytes per second are SI (1e12, 1e9); memory is in bytes. TPU v4 is the chip of Pope et al. (section 4); what
the compiler makes of each TPU generation was measured by compiling for it (jax 0.10.2, libtpu 0.0.52).

Bandwidth of the network: `link_bandwidth` is that of one link, one way; `network_bandwidth`, all links of a chip, is
the paper's single number (270 GB/s on v4). Data sheets of TPUs add both ways, those of NVLink too. planner/network.py
says which of them a collective can use.
"""

import dataclasses

from t5x_inference_ext.errors import UserError

# A TPU keeps arrays in tiles of so many columns, or at most so many rows: what begins elsewhere is copied first.
LANES = 128
# Attention computes at most this many logits at once on a chip (1 GiB in float32), and beyond that
# some rows at a time: model/attention.py does so, and planner/memory.py counts on it.
MAX_ATTENTION_LOGITS = 2**28


@dataclasses.dataclass(frozen=True)
class Chip:
  """One accelerator.

  Attributes:
    bf16_flops, int8_ops: peak matrix rates per second.
    hbm_bytes, hbm_bandwidth: memory, and bytes per second to and from it.
    compiler_hbm_bytes: what the TPU compiler lets a program use, as its out-of-memory message says; None for GPUs.
    torus: physical axes of the network, 0 where chips meet at a switch.
    links: of the torus, per chip.
    link_bandwidth: bytes per second, one way: over one link; over all of NVLink where there is no torus.
    hop_latency: seconds from a chip to the next.
    clock_hz: what the compiler's estimated cycles count; None where no compiler estimates cycles.
    matrix_rows: rows that a product with a tile of weights takes the time of, however few they are. A systolic array
      takes as many cycles to load its tile as it has rows; the tiles of GPU tensor cores have a side of 8.
    node: chips that NVLink joins; 0 on a torus, which has no nodes.
    node_bandwidth: bytes per second, one way, of each chip to chips of other nodes; 0 on a torus.
    source: where the numbers are published.
  """

  name: str
  bf16_flops: float
  int8_ops: float
  hbm_bytes: float
  hbm_bandwidth: float
  compiler_hbm_bytes: float | None
  torus: int
  links: int
  link_bandwidth: float
  hop_latency: float
  clock_hz: float | None
  matrix_rows: int
  node: int
  node_bandwidth: float
  source: str

  @property
  def network_bandwidth(self) -> float:
    """Bytes per second one way over all links of a chip: the paper's one bandwidth for every collective."""
    return self.link_bandwidth * max(self.links, 1)

  @property
  def usable_bytes(self) -> float:
    """Of the memory, what a program may take: the compiler's figure, or nine tenths, as a runtime takes its share."""
    return self.compiler_hbm_bytes or 0.9 * self.hbm_bytes


_GIB = 2**30

# Hop latency: about 1 us was measured on v4; the other generations are taken to be alike.
#
# Clocks: peak bf16 FLOP/s over the FLOPs that the matrix units do in a cycle. The latter is the power of two just above
# the best rate that the compiler estimates for a bf16 product of [n, n] by [n, n], n = 4096, 8192, 16384:
#        estimated FLOP/cycle   units                                   FLOP/cycle   clock
#   v4   245,619                2 cores x 4 units x 128 x 128 x 2          262,144   275e12 / 262,144 = 1.05 GHz
#   v5e  126,898                1 core  x 4 units x 128 x 128 x 2          131,072   197e12 / 131,072 = 1.50 GHz
#   v5p  252,216                2 cores x 4 units x 128 x 128 x 2          262,144   459e12 / 262,144 = 1.75 GHz
#   v6e  455,675                1 core  x 4 units x 256 x 256 x 2          524,288   920e12 / 524,288 = 1.75 GHz
CHIPS = {
  c.name: c
  for c in (
    # int8 runs at the bf16 rate.
    Chip(
      'v4',
      275e12,
      275e12,
      32 * _GIB,
      1200e9,
      30.75 * _GIB,
      3,
      6,
      45e9,
      1e-6,
      1.05e9,
      128,
      0,
      0,
      'Pope et al. 2022, section 4: 275 TFLOP/s, 32 GiB at 1200 GB/s, 270 GB/s of network one way',
    ),
    Chip(
      'v5e',
      197e12,
      394e12,
      16e9,
      819e9,
      15.75 * _GIB,
      2,
      4,
      45e9,
      1e-6,
      1.50e9,
      128,
      0,
      0,
      'cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 394 TOP/s, 16 GB at 819 GB/s, 400 GB/s of network both ways',
    ),
    # 2765 GB/s rounded.
    Chip(
      'v5p',
      459e12,
      918e12,
      96e9,
      2800e9,
      95.73 * _GIB,
      3,
      6,
      90e9,
      1e-6,
      1.75e9,
      128,
      0,
      0,
      'cloud.google.com/tpu/docs/v5p: 459 TFLOP/s, 918 TOP/s, 95 GB at 2765 GB/s, 1200 GB/s of network both ways',
    ),
    Chip(
      'v6e',
      920e12,
      1840e12,
      32e9,
      1600e9,
      31.24 * _GIB,
      2,
      4,
      90e9,
      1e-6,
      1.75e9,
      256,
      0,
      0,
      'cloud.google.com/tpu/docs/v6e: 918 TFLOP/s, 1836 TOP/s, 32 GB at 1600 GB/s, 800 GB/s of network both ways',
    ),
    # SXM boards, dense rates. NVLink: 600 and 900 GB/s both ways. Nodes of 8 (DGX), a network card for each chip.
    Chip(
      'A100',
      312e12,
      624e12,
      80e9,
      2039e9,
      None,
      0,
      0,
      300e9,
      1e-6,
      None,
      8,
      8,
      25e9,
      'NVIDIA A100 and DGX A100 data sheets: 312 TFLOP/s, 80 GB at 2039 GB/s, NVLink 600 GB/s, 8 cards of 200 Gb/s',
    ),
    Chip(
      'H100',
      990e12,
      1980e12,
      80e9,
      3350e9,
      None,
      0,
      0,
      450e9,
      1e-6,
      None,
      8,
      8,
      50e9,
      'NVIDIA H100 and DGX H100 data sheets: 990 TFLOP/s, 80 GB at 3350 GB/s, NVLink 900 GB/s, 8 cards of 400 Gb/s',
    ),
    Chip(
      'H200',
      990e12,
      1980e12,
      141e9,
      4800e9,
      None,
      0,
      0,
      450e9,
      1e-6,
      None,
      8,
      8,
      50e9,
      'NVIDIA H200, DGX H200 data sheets: 990 TFLOP/s, 141 GB at 4800 GB/s, NVLink 900 GB/s, 8 cards of 400 Gb/s',
    ),
  )
}


def chip(name: str) -> Chip:
  """'v4' -> TPU v4.

  Raises:
    UserError: a name that is not in CHIPS.
  """
  if name not in CHIPS:
    raise UserError(f'no chip is called {name!r}: there are {", ".join(CHIPS)}')
  return CHIPS[name]
