"""Examples of seqio tasks as the model takes them: its own BOS, or none, where T5X has id 0."""

import numpy as np
import pytest

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.runs import tasks

FEATURES = {
  'decoder_input_tokens': np.array([0, 5, 6, 7, 8, 0]),
  'decoder_target_tokens': np.array([5, 6, 7, 8, 0, 0]),
  'decoder_loss_weights': np.array([0, 0, 1, 1, 0, 0]),
}


@pytest.mark.parametrize(
  'bos,inputs,targets,weights',
  [
    (0, [0, 5, 6, 7], [5, 6, 7, 8], [0, 0, 1, 1]),
    (9, [9, 5, 6, 7], [5, 6, 7, 8], [0, 0, 1, 1]),
    (None, [5, 6, 7], [6, 7, 8], [0, 1, 1]),
  ],
)
def test_scoring_example(bos, inputs, targets, weights):
  found = tasks.scoring_example(tasks.TaskExample({}, FEATURES), bos)
  assert [list(part) for part in found] == [inputs, targets, weights]


def test_prompt():
  assert tasks.with_bos(3, [5, 6], (9,)) == (9, 5, 6)
  assert tasks.with_bos(3, [5, 6], ()) == (5, 6)
  assert tasks.with_bos(3, [], (0,)) == (0,)
  with pytest.raises(
    RequestError, match='example 3 has an empty prompt, and this model has no BOS'
  ):
    tasks.with_bos(3, [], ())
