"""Kill a conversion with a calibration again and again, and compare its bytes with another's.

  python -m benchmarks.calibration_kills --kills=40

Run from the root of a checkout. A conversion of the bundled checkpoint to int4 by GPTQ runs to its
end. Then the same conversion, in another directory, is started over and over and killed (SIGKILL)
at a random moment of its work, until it has been killed --kills times and has finished; whenever it
finishes, the output is compared, and another one begins. Prints how many outputs were finished, how
many differ, and how many finished layers were lost.
"""

import argparse
import hashlib
import multiprocessing
import os
import pathlib
import random
import shutil
import tempfile
import time

import numpy as np

from benchmarks.weight_quality import BUNDLED, HELDOUT

ROWS = 4


def work(source: str, output: str, tokens: str, events) -> None:
  """Convert, and count each rounded matrix in `events`."""
  import jax

  from t5x_inference_ext.checkpoints import convert

  jax.config.update('jax_platforms', 'cpu')
  # What a process compiles, the next one reads: a conversion then consists of its own work.
  jax.config.update('jax_compilation_cache_dir', os.path.join(os.path.dirname(tokens), 'programs'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)

  def progress(what: str, done: int, total: int) -> None:
    del done, total
    with events.get_lock():
      events.value += 1
    time.sleep(0.01 if what.startswith('calibrate') else 0)

  convert.convert(source, output, 'int4', calibration=tokens, progress=progress)


def digest(path: pathlib.Path) -> str:
  """Return a hash of all names and contents below a directory."""
  total = hashlib.sha256()
  for file in sorted(p for p in path.rglob('*') if p.is_file()):
    total.update(str(file.relative_to(path)).encode() + b'\0' + file.read_bytes())
  return total.hexdigest()


def layers_done(output: pathlib.Path) -> int:
  """Return the number of rounded layers in a work directory."""
  found = pathlib.Path(f'{output}.unfinished', 'calibration').glob('layer-*')
  return sum(path.name.removeprefix('layer-').isdecimal() for path in found)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=40)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--checkpoint', default=str(BUNDLED))
  arguments = parser.parse_args()
  rng = random.Random(arguments.seed)
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['jax', 't5x_inference_ext.checkpoints.calibration.conversion'])
  with tempfile.TemporaryDirectory() as scratch:
    tokens, whole = f'{scratch}/tokens.npy', pathlib.Path(scratch, 'whole')
    np.save(tokens, np.load(HELDOUT)[:ROWS])

    def start(output: pathlib.Path):
      events = context.Value('i', 0)
      process = context.Process(
        target=work, args=(arguments.checkpoint, str(output), tokens, events)
      )
      process.start()
      return process, events

    process, events = start(whole)
    process.join()
    assert process.exitcode == 0
    expected, total = digest(whole), events.value
    kills = finished = different = lost = 0
    while kills < arguments.kills or not finished:
      output = pathlib.Path(scratch, f'output{finished}')
      own = 0
      while not output.exists() or os.path.lexists(f'{output}.unfinished'):
        before = layers_done(output)
        process, events = start(output)
        wanted = rng.randrange(total // 3)
        while own < 12 and process.is_alive() and events.value < wanted:  # then it may finish
          time.sleep(0.001)
        if own < 12 and process.is_alive():
          time.sleep(rng.uniform(0, 0.05))
          process.kill()
        process.join()
        own += process.exitcode != 0
        if os.path.exists(f'{output}.unfinished'):
          lost += max(0, before - layers_done(output))
        assert process.exitcode in (0, -9), process.exitcode
      kills, finished = kills + own, finished + 1
      different += digest(output) != expected
      shutil.rmtree(output)
    print(
      f'{kills} kills, {finished} finished outputs, {different} different, {lost} rounded layers '
      f'lost; a whole conversion reports {total} matrices and blocks'
    )


if __name__ == '__main__':
  main()
