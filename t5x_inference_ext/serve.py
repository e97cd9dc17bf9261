"""Runs `python -m t5x_inference_ext.serve`: see commands/serve.py."""

import sys

from t5x_inference_ext.commands.serve import run

if __name__ == '__main__':
  sys.exit(run())
