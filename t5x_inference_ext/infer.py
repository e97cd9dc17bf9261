"""Runs `python -m t5x_inference_ext.infer`: see commands/infer.py."""

import sys

from t5x_inference_ext.commands.infer import run

if __name__ == '__main__':
  sys.exit(run())
