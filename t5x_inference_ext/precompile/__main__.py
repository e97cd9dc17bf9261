"""Run the precompile command: `python -m t5x_inference_ext.precompile` (commands/precompile.py)."""

import sys

from t5x_inference_ext.commands.precompile import run

if __name__ == '__main__':
  sys.exit(run())
