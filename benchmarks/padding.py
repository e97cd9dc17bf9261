"""The share of padding when ragged examples are scored: in a file's order, and in length buckets.

    python -m benchmarks.padding

engine.length_buckets makes the buckets. Lengths are those of benchmarks.continuous, prompt and
output together. Batches hold as many tokens as 32 rows of the longest example. No model runs.
"""

from benchmarks.continuous import ragged
from t5x_inference_ext.engine.length_buckets import Packer

ROWS = 32


def main() -> None:
  for count in (256, 2048, 16384):
    lengths = [len(r.tokens) + r.limit for r in ragged(384, count, 512, 256)]
    in_order = sum(ROWS * max(lengths[i : i + ROWS]) for i in range(0, count, ROWS))
    packs = Packer(ROWS * max(lengths), lambda rows: rows).pack(lengths)
    packed = sum(p.rows * p.length for p in packs)
    shapes = len({(p.rows, p.length) for p in packs})
    print(
      f'{count} examples: padding {1 - sum(lengths) / in_order:.1%} in order, '
      f'{1 - sum(lengths) / packed:.1%} packed, in {len(packs)} batches of {shapes} shapes'
    )


if __name__ == '__main__':
  main()
