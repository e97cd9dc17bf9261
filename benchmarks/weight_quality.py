"""Bits per byte by the format of weights, beside llama.cpp's Q4_0 of the same weights.

  python -m benchmarks.weight_quality                       palm_tiny, the bundled checkpoint
  python -m benchmarks.weight_quality --model=SmolLM2-135M-Instruct.Q4_1.gguf

Activations are float32, and the embedding is bfloat16 unless the format says otherwise. palm_tiny
is measured on rows 32 to 63 of tests/testdata/golden/heldout_tokens.npy, other models on the texts
of text_quality. GPTQ is calibrated on rows 0 to 31 of the file; for other models, on --rows rows of
512 tokens, half of them from Python's language reference, half from its library. A GGUF file's
weights, quantized themselves, stand for float32. Q4_0 is the gguf package's quantizer: blocks of 32
inputs of a channel, each with its own float16 scale, 4.5 bits a weight, for the layers' matrices
alone. The last column is the size of the layers' matrices and their scales beside float32.
"""

import argparse
import dataclasses
import inspect
import math
import pathlib
from pydoc_data import topics
import tempfile

import gguf
import jax
import numpy as np

from benchmarks.text_quality import GOLDEN, bits_per_byte, texts_of
from t5x_inference_ext import params
from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.checkpoints.calibration.rows import TEXT_LENGTH
from t5x_inference_ext.checkpoints.tensor import InMemory
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.runs import quality
from t5x_inference_ext.runs.rounded_tensors import with_tensors

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUNDLED = ROOT / 'examples' / 'palm_tiny' / 'checkpoint_1000'
HELDOUT = ROOT / 'tests' / 'testdata' / 'golden' / 'heldout_tokens.npy'
MEASURED = slice(32, 64)
CALIBRATED = slice(0, 32)
# Name -> options of the conversion. `calibrated` stands for the calibration text.
CONVERTED = {
  'int8': dict(weights='int8'),
  'int8, embedding:8': dict(weights='int8', bits='embedding:8'),
  'int4, GPTQ': dict(weights='int4', calibrated=True),
  'int4, GPTQ, mlp_output:8': dict(weights='int4', bits='mlp_output:8', calibrated=True),
  'int4, rounded': dict(weights='int4'),
  'int4, not clipped': dict(weights='int4', scale_search='absmax'),
  'int4, mlp_output:8': dict(weights='int4', bits='mlp_output:8'),
}
Q4_0 = gguf.GGMLQuantizationType.Q4_0
Q4_0_BITS = 4.5


def as_q4_0(source):
  """Return the checkpoint with the layers' matrices as Q4_0 stands for them."""
  made = {}
  for name, p in params.parameters(source.config).items():
    if p.kind == 'matrix':
      rows = np.swapaxes(source.tensors[name].read().astype(np.float32), 1, 2)  # [L, out, in]
      stored = gguf.quants.quantize(np.ascontiguousarray(rows), Q4_0)
      values = gguf.quants.dequantize(stored, Q4_0).reshape(rows.shape)
      made[name] = InMemory(np.swapaxes(values, 1, 2).astype(np.float32), 'Q4_0')
  return with_tensors(source, made)


def bits(checkpoint) -> dict[str, float]:
  """Return a model's bits per byte, by the name of the text."""
  if checkpoint.config.vocab_size == 384:  # bytes
    targets = np.load(HELDOUT)[MEASURED].astype(np.int32)
    return {'heldout': quality.loss(checkpoint, targets) / math.log(2)}
  engine = Engine.load(checkpoint, mesh='1x1x1', dtype='float32', scan_layers=True)
  with np.load(GOLDEN / 'scores.npz') as scores:
    texts = texts_of(dict(scores))
  found = {}
  for name, (ids, _) in texts.items():
    scored = engine.score_completions([(row[:1], row[1:]) for row in ids.tolist()])
    found[name] = bits_per_byte(checkpoint.vocabulary, ids, np.asarray(scored))
  return found


def calibration_tokens(checkpoint, rows: int) -> np.ndarray:
  """Return token ids [rows, length] to calibrate with, none of which are measured."""
  if checkpoint.config.vocab_size == 384:  # bytes
    return np.load(HELDOUT)[CALIBRATED]
  ids: list[int] = []
  prose = '\n'.join(topics.topics[name] for name in sorted(topics.topics))
  code = ''.join(map(inspect.getsource, (argparse, dataclasses, pathlib, tempfile)))
  for text in prose, code:
    own = checkpoint.vocabulary.encode(text)
    assert len(own) >= rows * TEXT_LENGTH // 2, f'a text has {len(own)} tokens: lower --rows'
    ids += own[: rows * TEXT_LENGTH // 2]
  return np.reshape(ids, (rows, TEXT_LENGTH))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--model', default=str(BUNDLED))
  parser.add_argument('--rows', type=int, default=16)
  parser.add_argument('--kinds', nargs='+', default=list(CONVERTED), choices=list(CONVERTED))
  arguments = parser.parse_args()
  jax.config.update('jax_default_matmul_precision', 'highest')
  source = open_checkpoint(arguments.model)
  before = bits(source)

  def show(kind: str, found: dict[str, float], size: float) -> None:
    cells = (f'{found[name]:.5f} | {found[name] / before[name] - 1:+.3%}' for name in before)
    print(f'| {kind} | {" | ".join(cells)} | {size:.3f} |', flush=True)

  print('| weights |', ' | '.join(f'{name}, bits per byte | more' for name in before), '| size |')
  print('|' + '---|' * (2 + 2 * len(before)))
  show('float32', before, 1.0)
  with tempfile.TemporaryDirectory() as scratch:
    tokens = f'{scratch}/tokens.npy'
    np.save(tokens, calibration_tokens(source, arguments.rows))
    for number, kind in enumerate(arguments.kinds):
      options = dict(CONVERTED[kind])
      calibration = tokens if options.pop('calibrated', False) else None
      output = f'{scratch}/{number}'
      report = convert.convert(arguments.model, output, calibration=calibration, **options)
      size = report.layer_bytes / report.layer_float32_bytes
      show(kind, bits(open_checkpoint(output)), size)
  show('Q4_0', bits(as_q4_0(source)), Q4_0_BITS / 32)


if __name__ == '__main__':
  main()
