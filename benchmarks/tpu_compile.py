"""What the TPU compiler makes of this package's programs, beside the targets: one table, no TPU.

  python -m benchmarks.tpu_compile [--case=SUBSTRING]

Each row is a phase of a PaLM model compiled at full size for a slice of TPU v4, embedding, logits and greedy choice
included. The time is the serial estimate of `python -m t5x_inference_ext.precompile`: everything in sequence, nothing
overlapped. Needs libtpu. The rows with all layers written out take two minutes each, the others seconds.
"""

import argparse
import dataclasses
import os
import time

os.environ['JAX_PLATFORMS'] = 'cpu'  # before jax is imported: nothing is computed here

from t5x_inference_ext.config import preset  # noqa: E402
from t5x_inference_ext.errors import UserError  # noqa: E402
from t5x_inference_ext.precompile.analysis import analyze  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Row:
  """A case of the table.

  Attributes:
    model, weights, slice_name, phase, batch, layout, mesh, scan_layers: as precompile's.
    target: milliseconds.
  """

  model: str
  weights: str
  slice_name: str
  phase: str
  batch: int
  layout: str
  target: float
  mesh: str | None = None
  scan_layers: bool | None = None

  def __str__(self) -> str:
    return (f'{self.model} {self.weights} {self.slice_name} {self.phase} batch {self.batch} {self.layout}'
            f'{f" mesh {self.mesh}" if self.mesh else ""}{" unrolled" if self.scan_layers is False else ""}')


# MFU 80% of PaLM 540B's 512 x 2048 tokens on 64 chips of 275 TFLOP/s.
MFU_80 = 2 * 540.36e9 * 512 * 2048 / (0.8 * 64 * 275e12) * 1e3

ROWS = (
    Row('palm_540b', 'int8', 'v4:4x4x4', 'decode', 64, 'ws_2d/batch', 20),
    Row('palm_540b', 'int8', 'v4:4x4x4', 'decode', 64, 'ws_2d/batch', 20, scan_layers=False),
    Row('palm_540b', 'bfloat16', 'v4:4x4x4', 'decode', 512, 'ws_2d/batch', 65),
    Row('palm_540b', 'bfloat16', 'v4:4x4x4', 'decode', 512, 'ws_2d/batch', 65, mesh='2x8x4'),
    Row('palm_540b', 'int8', 'v4:4x4x4', 'prefill', 1, 'ws_2d/batch', 220),
    Row('palm_540b', 'int8', 'v4:4x4x4', 'prefill', 1, 'ws_2d/heads', 220, mesh='2x8x4'),
    Row('palm_540b', 'bfloat16', 'v4:4x4x4', 'prefill', 512, 'wg_xyz/batch', MFU_80),
    Row('palm_62b', 'int8', 'v4:2x2x4', 'decode', 32, 'ws_2d/batch', 8),
    Row('palm_62b', 'int8', 'v4:2x2x4', 'decode', 32, 'ws_2d/batch', 8, scan_layers=False),
    Row('palm_8b', 'int8', 'v4:2x2x1', 'decode', 32, 'ws_2d/batch', 5),
    Row('palm_8b', 'int8', 'v4:2x2x1', 'decode', 32, 'ws_2d/batch', 5, scan_layers=False),
)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--case', default='', help='only rows whose text holds this')
  arguments = parser.parse_args()
  print('| case | serial estimate, ms | with overlap | target, ms | of the target | compiled in, s |')
  print('|---|---|---|---|---|---|', flush=True)
  for row in (r for r in ROWS if arguments.case in str(r)):
    start = time.perf_counter()
    try:
      answer = analyze(preset(row.model), row.weights, row.slice_name, row.phase, row.batch, 2048, layout=row.layout,
                       mesh=row.mesh, scan_layers=row.scan_layers)
    except UserError as error:
      raise SystemExit(f'{row}: {error}') from error
    seconds = time.perf_counter() - start
    if not answer.fits:
      print(f'| {row} | does not fit | | {row.target:.0f} | | {seconds:.0f} |', flush=True)
      continue
    serial, overlapped = answer.estimate.serial_seconds * 1e3, answer.estimate.overlapped_seconds * 1e3
    print(f'| {row} | {serial:.2f} | {overlapped:.2f} | {row.target:.0f} | {serial / row.target:.2f} | {seconds:.0f} |',
          flush=True)


if __name__ == '__main__':
  main()
