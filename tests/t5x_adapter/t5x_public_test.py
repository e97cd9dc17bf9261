"""Public models inside T5X: their own BOS, or none, where T5X has id 0 in front of every prompt."""

import shutil

import numpy as np
import pytest
import seqio
import tokenizers

from t5x_inference_ext.checkpoints import open_checkpoint
from t5x_inference_ext.checkpoints.convert import convert
from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.errors import CheckpointError, RequestError
from t5x_inference_ext.runs import tasks
from t5x_inference_ext.t5x.models import InferenceModel
from t5x_inference_ext.t5x.refill import Refill
from t5x_inference_ext.t5x.vocabulary import CheckpointVocabulary
from tests.checkpoints.public_formats_test import families
from tests.t5x_adapter import running
from tests.t5x_adapter.t5x_models_test import batch_of, predict

__all__ = ['families']
PROMPTS = [[5, 9, 17, 4], [88, 7], [30, 31, 32, 33, 34, 35, 36]]
LENGTH, STEPS = 24, 12
EOS = 2


def _model(checkpoint, mesh, **options) -> InferenceModel:
  vocabulary = seqio.PassThroughVocabulary(size=131, eos_id=EOS)
  return InferenceModel(
    vocabulary, str(checkpoint), mesh=mesh, decode_fn=running.GREEDY, dtype='float32', **options
  )


@pytest.fixture(params=['smollm2', 'bloom', 'phi'])
def public(request, families):
  """A family: grouped heads with rotary positions, ALiBi, and partial rotary with biases."""
  return families / request.param


def _tokenizer() -> bytes:
  """A tokenizer of seven ids: the models here have 131 rows."""
  words = ['<unk>', '<s>', '</s>', 'a', 'b', 'c', 'Ġ']  # Ġ: a space, as ByteLevel writes it
  tokenizer = tokenizers.Tokenizer(
    tokenizers.models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[])
  )
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(words[:3])
  return tokenizer.to_str().encode()


def _with_bos(source, tmp_path):
  """The model with a tokenizer beside it, whose BOS is 1."""
  path = shutil.copytree(source, tmp_path / 'model')
  (path / 'tokenizer.json').write_bytes(_tokenizer())
  settings = '{"bos_token": "<s>", "add_bos_token": true, "eos_token": "</s>"}'
  (path / 'tokenizer_config.json').write_text(settings)
  assert open_checkpoint(path).bos_id == 1
  return path


def _check(checkpoint, mesh, **options):
  """T5X's predictions and scores are those of the engine alone."""
  model = _model(checkpoint, mesh, **options)
  state = running.restored(model, checkpoint)
  batch = batch_of(PROMPTS, LENGTH)
  engine = Engine.load(checkpoint, mesh='1x1x1', dtype='float32')
  expected = engine.generate(PROMPTS, max_new_tokens=STEPS, eos_id=EOS)
  if options.get('refill'):
    tokens, _ = model.predict_batch_with_aux(state[0].params, batch)
  else:
    tokens, _ = predict(model, state, batch)
  for row, prompt, completion in zip(np.asarray(tokens), PROMPTS, expected, strict=True):
    room = LENGTH - len(prompt)
    assert completion.tokens[:room] == row[: len(completion.tokens)].tolist()[:room]
  completions = [list(completion.tokens) for completion in expected]
  scored = batch_of([p + c for p, c in zip(PROMPTS, completions)], LENGTH + STEPS)
  weights, targets = (np.zeros((3, LENGTH + STEPS), np.int32) for _ in range(2))
  for i, (prompt, completion) in enumerate(zip(PROMPTS, completions)):
    targets[i, : len(prompt + completion)] = prompt + completion
    weights[i, len(prompt) : len(prompt + completion)] = 1
  scored |= {'decoder_target_tokens': targets, 'decoder_loss_weights': weights}
  found = np.asarray(model.score_batch(state[0].params, scored))
  np.testing.assert_allclose(found, [completion.score for completion in expected], rtol=1e-4)


@pytest.mark.parametrize('mesh', ['1x1x1', '2x2x2'])
def test_without_bos(public, mesh):
  """These directories say no vocabulary: prompts are ids alone, and no token is in front."""
  assert open_checkpoint(public).bos_id is None
  _check(public, mesh)


def test_with_a_bos_of_its_own(families, tmp_path):
  """Served as it is, and from a serving checkpoint, which records BOS."""
  path = _with_bos(families / 'smollm2', tmp_path)
  _check(path, '1x2x2')
  convert(str(path), str(tmp_path / 'out'), 'int8')
  _check(tmp_path / 'out', '2x2x2')


def test_slot_refill(public):
  _check(public, '1x2x2', refill=Refill(slots=2, chunk=4, max_new_tokens=STEPS))


def test_an_empty_prompt_needs_a_bos(families, tmp_path):
  refill = Refill(slots=2, chunk=4, max_new_tokens=STEPS)
  model = _model(families / 'smollm2', '1x1x1', refill=refill)
  state = running.restored(model, families / 'smollm2')
  with pytest.raises(RequestError, match='empty prompt, and this model has no BOS'):
    model.predict_batch_with_aux(state[0].params, batch_of([[]], LENGTH))
  path = _with_bos(families / 'smollm2', tmp_path)
  model = _model(path, '1x1x1')
  tokens, _ = predict(model, running.restored(model, path), batch_of([[], [5]], LENGTH))
  engine = Engine.load(path, mesh='1x1x1', dtype='float32')
  for row, completion in zip(tokens, engine.generate([[], [5]], max_new_tokens=8, eos_id=EOS)):
    assert row[: len(completion.tokens)].tolist() == list(completion.tokens)


def test_the_vocabulary_of_a_checkpoint(families, tmp_path):
  path = _with_bos(families / 'smollm2', tmp_path)
  vocabulary = CheckpointVocabulary(path)
  own = open_checkpoint(path).vocabulary
  assert (vocabulary.bos_id, vocabulary.eos_id) == (1, own.end_ids[0])
  assert vocabulary.vocab_size == own.size
  text = 'ab cab'
  ids = own.encode(text)
  assert ids and vocabulary.encode(text) == ids and vocabulary.decode(ids) == own.decode(ids)
  assert vocabulary.encode_tf(text).numpy().tolist() == ids
  assert vocabulary.decode_tf(np.asarray(ids, np.int32)).numpy().decode() == own.decode(ids)
  # Rows end with EOS, and T5X pads them with 0.
  assert vocabulary.decode([*ids, vocabulary.eos_id, 0, 0]) == own.decode(ids)
  copy = shutil.copytree(path, tmp_path / 'copy')
  assert vocabulary == CheckpointVocabulary(copy)
  assert vocabulary != seqio.ByteVocabulary()
  with pytest.raises(CheckpointError, match='smollm2 has no vocabulary: use a seqio one'):
    CheckpointVocabulary(families / 'smollm2')


def test_a_task_alone_is_what_it_is_inside_t5x(families, tmp_path):
  """`infer` over a seqio task feeds a public model its own BOS, or none, too."""
  for i, path in enumerate((families / 'smollm2', _with_bos(families / 'smollm2', tmp_path))):
    engine = Engine.load(path, mesh='1x1x1', dtype='float32')
    prompt = PROMPTS[0]
    (generated,) = engine.generate([prompt], max_new_tokens=3, eos_id=-1)
    completion = list(generated.tokens)
    targets = np.array([*prompt, *completion, 0])
    features = {
      'decoder_input_tokens': np.array([0, *targets[:-1]]),
      'decoder_target_tokens': targets,
      'decoder_loss_weights': np.array([0] * len(prompt) + [1] * len(completion) + [0]),
    }
    example = tasks.scoring_example(tasks.TaskExample({}, features), engine.checkpoint.bos_id)
    assert list(example.inputs) == [*([1] if i else []), *prompt, *completion[:-1]]
    found = engine.score(*(np.array([part]) for part in example))
    np.testing.assert_allclose(found, generated.score, rtol=1e-5)
