"""16 and 64 simulated devices against the reference, each in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from tests.model import many_devices


@pytest.mark.parametrize('devices', sorted(many_devices.CASES))
def test_on_more_devices(repository, devices):
  environment = {
    **os.environ,
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
    'PYTHONPATH': os.pathsep.join([str(repository), os.environ.get('PYTHONPATH', '')]),
  }
  process = subprocess.run(
    [sys.executable, '-W', 'error', '-m', 'tests.model.many_devices'],
    cwd=repository,
    env=environment,
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert process.returncode == 0, process.stderr[-5000:]
  results = [json.loads(line) for line in process.stdout.splitlines()]
  assert [tuple(case) for *case, _ in results] == many_devices.CASES[devices]
  for *case, result in results:
    print(*case, result)
    assert result['same'] and result['error'] < 1e-4, case
