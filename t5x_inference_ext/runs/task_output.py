"""Output files of a run over a task, local or in a bucket. Only process 0 writes them."""

from collections.abc import Iterable, Iterator
import contextlib
import os
from typing import IO, Any

import tensorflow as tf

from t5x_inference_ext import distributed
from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.runs.tasks import Source
from t5x_inference_ext.text_files import json_line

gfile = tf.io.gfile
COMPLETED_SUFFIX = '.COMPLETED'


def output_path(name: str, source: Source, mode: str, output_dir: str) -> str:
  """Return the path of a task's output, in T5X's naming."""
  return os.path.join(
    output_dir, f'{name}-{mode}.jsonl-{source.shard:05}-of-{source.num_shards:05}'
  )


def make_directory(path: str) -> None:
  """Make a directory if it does not exist; raise RequestError if that fails."""
  if distributed.is_main():
    with _errors(path):
      gfile.makedirs(path)


@contextlib.contextmanager
def open_output(path: str) -> Iterator[IO[str]]:
  """Context manager: open a file for writing; processes other than 0 write nothing.

  Raises:
    RequestError: The file can't be written, for example on a full disk.
  """
  with _errors(path), gfile.GFile(path if distributed.is_main() else os.devnull, 'w') as file:
    yield file


def write_rows(path: str, rows: Iterable[Any]) -> None:
  """Write JSON rows under a temporary name, rename the file, and mark it as completed."""
  temporary = f'{path}.incomplete'
  with open_output(temporary) as file:
    for row in rows:
      file.write(json_line(row) + '\n')
  if distributed.is_main():
    with _errors(path):
      gfile.rename(temporary, path, overwrite=True)
  with open_output(path + COMPLETED_SUFFIX) as file:
    file.write('')


@contextlib.contextmanager
def _errors(path: str) -> Iterator[None]:
  """Context manager: convert TensorFlow's file errors to a RequestError that names the file."""
  try:
    yield
  except tf.errors.OpError as error:
    raise RequestError(f"can't write {path}: {error.message}") from error
