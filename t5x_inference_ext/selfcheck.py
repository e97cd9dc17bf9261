"""Runs `python -m t5x_inference_ext.selfcheck`: see commands/selfcheck.py."""

import sys

from t5x_inference_ext.commands.selfcheck import run

if __name__ == '__main__':
  sys.exit(run())
