"""Runs `python -m t5x_inference_ext.inspect_checkpoint`: see commands/inspect_checkpoint.py."""

import sys

from t5x_inference_ext.commands.inspect_checkpoint import run

if __name__ == '__main__':
  sys.exit(run())
