"""Runs `python -m t5x_inference_ext.convert_checkpoint`: see commands/convert_checkpoint.py."""

import sys

from t5x_inference_ext.commands.convert_checkpoint import run

if __name__ == '__main__':
  sys.exit(run())
