"""Draw the README's figure: a decode step of PaLM on TPU v4, beside stock T5X.

  python -m benchmarks.headline_figure [--output=docs/figures/decode_step.svg]

The times are those of docs/benchmarks.md, which `python -m benchmarks.tpu_compile` prints: serial
estimates of both programs as the TPU compiler made them. A given version of matplotlib always
writes the same bytes.
"""

import argparse

import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot  # noqa: E402

# Model and slice: milliseconds of a decode step, here (int8 weights) and in stock T5X (bfloat16).
STEPS = {
  'PaLM 8B\n4 chips, 32 rows': (4.5, 55),
  'PaLM 62B\n16 chips, 32 rows': (7.96, 138),
  'PaLM 540B\n64 chips, 64 rows': (17.9, 779),
}
SIDES = ('t5x_inference_ext, int8 weights', 'stock T5X, bfloat16 weights')
COLOURS = ('#2a78d6', '#86857d')
LABEL = {'textcoords': 'offset points', 'va': 'center'}


def draw(output: str) -> None:
  """Write the figure, as SVG or PNG by the file's name."""
  pyplot.rcParams.update(
    {'svg.hashsalt': 't5x_inference_ext', 'svg.fonttype': 'none', 'font.size': 10}
  )
  figure, axes = pyplot.subplots(figsize=(7.6, 2.6), layout='constrained')
  rows = range(len(STEPS))
  ours, stock = zip(*STEPS.values(), strict=True)
  axes.hlines(rows, ours, stock, color='#c3c2b7', linewidth=2, zorder=1)
  for times, colour, label in zip((ours, stock), COLOURS, SIDES, strict=True):
    axes.scatter(times, rows, s=90, color=colour, label=label, zorder=2)
  for row, (fast, slow) in enumerate(STEPS.values()):
    axes.annotate(f'{fast:g} ms', (fast, row), (-9, 0), ha='right', **LABEL)
    axes.annotate(f'{slow:g} ms', (slow, row), (9, 0), ha='left', **LABEL)
    axes.annotate(f'{slow / fast:.0f}x', ((fast * slow) ** 0.5, row), (0, 8), ha='center', **LABEL)
  axes.set_yticks(rows, STEPS)
  axes.set_ylim(len(STEPS) - 0.5, -0.5)
  axes.set_xscale('log')
  axes.set_xlim(1.5, 3000)
  axes.set_xticks([10, 100, 1000], ['10', '100', '1000'])
  axes.set_xlabel('one decode step, ms (log scale): estimate from the program compiled for TPU v4')
  axes.spines[['top', 'right', 'left']].set_visible(False)
  axes.tick_params(axis='y', length=0)
  axes.legend(frameon=False, loc='lower center', bbox_to_anchor=(0.45, 1), ncols=2)
  metadata = {'Date': None} if output.endswith('.svg') else {'Software': None}
  figure.savefig(output, dpi=120, metadata=metadata)
  pyplot.close(figure)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--output', default='docs/figures/decode_step.svg')
  draw(parser.parse_args().output)
