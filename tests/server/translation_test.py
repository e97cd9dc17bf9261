import pytest

from t5x_inference_ext.server.api_errors import ApiError
from t5x_inference_ext.server.bodies import ChatBody, CompletionBody, Message
from t5x_inference_ext.server.translation import Translator, first_seed, size_of
from t5x_inference_ext.text.settings import TextSettings, unknown_vocabulary

TEMPLATE = (
  '{{ bos_token }}{% for m in messages %}{{ m.content }}|{% for c in m.tool_calls or [] %}'
  '{{ c.function.arguments.city }}{% endfor %}{% endfor %}{{ more }}'
)
BYTES = TextSettings('bytes', chat_template=TEMPLATE)


def _translator(settings=BYTES, max_length=32):
  return Translator(settings, 384, max_length)


def _refused(call, *args):
  with pytest.raises(ApiError) as error:
    call(*args)
  return error.value


def _request(translator, tokens, **body):
  body = CompletionBody(prompt='x', **body)
  return translator.request(body, tokens, 0, 'prompt', first_seed(body))


class TestPrompts:
  def test_bos_stands_in_front(self):
    assert _translator().bos == (0,)
    assert _translator(TextSettings('bytes', bos_id=None)).bos == ()
    assert _translator(unknown_vocabulary()).bos == (0,)

  def test_text_needs_a_vocabulary(self):
    error = _refused(_translator(unknown_vocabulary()).prompt_ids, 'x')
    assert error.param == 'prompt' and 'send token ids' in error.message
    assert _translator(unknown_vocabulary()).prompt_ids([5, 6]) == [5, 6]

  def test_an_empty_prompt_starts_from_bos_alone(self):
    assert _translator().room(1, 'prompt') == 32
    assert 'no BOS' in _refused(_translator().room, 0, 'prompt').message


class TestChat:
  def test_a_bos_without_text_is_put_in_front(self):
    ids = _translator().chat_ids([Message(role='user', content='a')], None, {'more': 'b'})
    assert ids == (0, 100, 127, 101)

  def test_without_a_template(self):
    error = _refused(_translator(TextSettings('bytes')).chat_ids, [Message(role='user')], None, {})
    assert error.status == 400 and error.code == 'no_chat_template'

  def test_a_template_that_refuses_or_fails(self):
    for template in ('{{ raise_exception("no system") }}', '{% for %}', '{{ 1 // 0 }}'):
      translator = _translator(TextSettings('bytes', chat_template=template))
      error = _refused(translator.chat_ids, [Message(role='system')], None, {})
      assert error.status == 400 and error.param == 'messages'

  def test_arguments_of_calls_are_objects(self):
    call = {'type': 'function', 'function': {'name': 'f', 'arguments': '{"city": "A"}'}}
    ids = _translator().chat_ids([Message(role='assistant', tool_calls=[call])], None, None)
    assert bytes(i - 3 for i in ids[1:]) == b'|A'


class TestRequests:
  def test_limits(self):
    assert _request(_translator(), [0, 5]).limit == 16
    assert _request(_translator(), [0] * 30).limit == 3
    assert _request(_translator(), [0] * 30, max_tokens=3).limit == 3
    error = _refused(lambda: _request(_translator(), [0] * 30, max_tokens=4))
    assert error.param == 'max_tokens' and 'at most 3' in error.message
    chat = ChatBody(messages=[{'role': 'user'}])
    assert _translator().request(chat, [0, 5], 0, 'messages', 0).limit == 31

  def test_seeds(self):
    assert _request(_translator(), [0], seed=2**32 - 1, n=2).seeds == (2**32 - 1, 0)
    assert _request(_translator(), [0], seed=-1).seeds == (2**32 - 1,)
    assert len({_request(_translator(), [0]).seeds for _ in range(5)}) == 5

  def test_ends_and_salts(self):
    request = _request(_translator(), [0], stop=['a', 'b'], cache_salt='me')
    assert request.end_ids == (1,) and request.stop_texts == ('a', 'b') and request.salt == 'me'
    assert _request(_translator(), [0], ignore_eos=True).end_ids == ()

  def test_the_replies_of_chats_are_kept_for_their_next_turns(self):
    chat = ChatBody(messages=[{'role': 'user'}])
    assert _translator().request(chat, [0, 5], 0, 'messages', 0).cache_reply
    assert not _request(_translator(), [0]).cache_reply

  def test_what_is_not_given_is_as_the_checkpoint_recommends(self):
    defaults = {'temperature': 0.2, 'top_k': 5}
    translator = _translator(TextSettings('bytes', generation_defaults=defaults))
    sampling = _request(translator, [0], top_p=0.5, temperature=0.7).sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.7, 5, 0.5)
    assert _request(_translator(), [0]).sampling.temperature == 1
    assert _request(_translator(), [0], top_k=-1).sampling.top_k == 0


@pytest.mark.parametrize(
  'value, size', [('h\u00e9', 3), ('\ud800', 3), ([1, 2, 3], 3), ([{'a': 1}], 10), (None, 4)]
)
def test_sizes(value, size):
  assert size_of(value) == size
