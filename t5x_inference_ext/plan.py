"""Runs `python -m t5x_inference_ext.plan`: see commands/plan.py."""

import sys

from t5x_inference_ext.commands.plan import run

if __name__ == '__main__':
  sys.exit(run())
