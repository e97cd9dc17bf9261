"""Seqio tasks over the golden prompts: bytes in, bytes out."""

import json
import pathlib

import seqio
import tensorflow as tf

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / 'testdata' / 'golden' / 'greedy.json'
TASK = 'golden_prompts_in_t5x'
LENGTHS = {'inputs': 48, 'targets': 48}


def rows() -> list[dict]:
  """Rows of prompt, prompt_tokens, greedy_tokens and greedy_text: 48 tokens of T5X's."""
  return json.loads(GOLDEN.read_text(encoding='utf-8'))


def _dataset(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
  del split, shuffle_files, seed
  return tf.data.Dataset.from_tensor_slices(
    {
      'inputs': [row['prompt'] for row in rows()],
      'targets': [bytes(t - 3 for t in row['greedy_tokens'] if t > 2) for row in rows()],
    }
  )


seqio.TaskRegistry.add(
  TASK,
  source=seqio.FunctionDataSource(_dataset, splits=['test']),
  preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
  output_features={
    'inputs': seqio.Feature(seqio.ByteVocabulary(), add_eos=False, required=False),
    'targets': seqio.Feature(seqio.ByteVocabulary(), add_eos=True),
  },
)
