"""Chat templates: what they may use, and what broken and hostile ones say."""

import pickle

import pytest

from t5x_inference_ext.errors import CheckpointError, RequestError
from t5x_inference_ext.text import chat_sandbox
from t5x_inference_ext.text.chat_template import ChatTemplate

CHATML = (
  "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
  "{{ '<|im_start|>system\nBe brief<|im_end|>\n' }}{% endif %}"
  "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = {'role': 'user', 'content': 'Hi <b>'}


def test_a_conversation_is_written():
  template = pickle.loads(pickle.dumps(ChatTemplate(CHATML)))
  text = '<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi <b><|im_end|>\n'
  assert template.render([USER]) == text + '<|im_start|>assistant\n'
  assert template.render([USER], add_generation_prompt=False) == text


@pytest.mark.parametrize(
  ('source', 'text'),
  [
    ('{{ messages | tojson }}', '[{"role": "user", "content": "Hi <b>"}]'),
    ('{{ tools | tojson(indent=2) }}', '[\n  {\n    "name": "é"\n  }\n]'),
    ('{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}', '1'),
    ('{% generation %}a{% endgeneration %}', 'a'),
    ("{{ strftime_now('%%') }}{{ bos_token }}{{ eos_token }}{{ extra }}", '%<s></s>x'),
    ('{% if (1 if messages else 0) %}{{ messages[0].content[:2] }}{% endif %}', 'Hi'),
    ("{% for k in ['b', 'a'] if k in {'a': 1} and {k: 2}[k] == 2 %}{{ k }}{% endfor %}", 'a'),
    ('{% with a = tools[0] %}{{ a.name == "é" }}{{ 2.567 | round(2) }}{% endwith %}', 'True2.57'),
    ("{{ ['a', 'b'] | join(', ') }}{{ 'a' ~ 1 }}{{ 'x' * 3 }}{{ 7 % 4 }}", 'a, ba1xxx3'),
    ("{{ tools | map(attribute='name') | join }}{{ missing }}", 'é'),
    (
      '{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}'
      "{{ ns.n }}{{ messages[0].content.split('<')[0].strip() | upper }}",
      '1HI',
    ),
    (
      "{% macro say(x) %}[{{ x }}]{% endmacro %}{{ say('a') }}\n{% if true %}\nb\n{% endif %}",
      '[a]\nb\n',
    ),
  ],
)
def test_what_templates_use_works(source, text):
  tools = [{'name': 'é'}]
  found = ChatTemplate(source).render(
    [USER], tools=tools, bos_token='<s>', eos_token='</s>', extra='x'
  )
  assert found == text


def test_variables_of_any_name():
  values = {'self': 1, 'messages_': 2, 'source': 3}
  assert ChatTemplate('{{ messages | length }}{{ source }}').render([USER], **values) == '13'


def test_a_template_may_refuse_messages():
  template = ChatTemplate("{{ raise_exception('no system\nrole') }}", 'x')
  with pytest.raises(RequestError, match=r'template of x refuses these messages: no system\\nrole'):
    template.render([USER])


TWICE = '{%% set ns = namespace(x=%s) %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.x }}'


@pytest.mark.parametrize(
  ('source', 'message'),
  [
    ('{% if %}', 'is broken in line 1'),
    ('{{ "a" | nothing }}', 'is broken in line 1'),
    ('{{ missing.attribute }}', 'fails with UndefinedError'),
    ('{{ 1 // 0 }}', 'fails with ZeroDivisionError'),
    ('{% break %}', 'fails with SyntaxError'),
    ('{% include "x" %}', 'fails with TypeError'),
    ('{{' * 50_000, 'nested too deeply'),
    ('{{ ' + '(' * 5000 + '1' + ')' * 5000 + ' }}', 'nested too deeply'),
    ('{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}', 'nested too deeply'),
    ('x' * (2**17 + 1), 'has more than 131072 characters'),
    ("{{ ''.__class__.__mro__ }}", 'SecurityError'),
    ('{{ cycler.__init__.__globals__ }}', 'SecurityError'),
    ('{{ messages.append(1) }}', 'SecurityError'),
    ("{{ '{:9999999999}'.format(1) }}", 'SecurityError'),
    ("{{ 'a'.ljust(9999999999) }}", 'SecurityError'),
    ("{{ 'a' | center(9999999999) }}", 'is broken'),
    ("{{ '%9999999999d' % 1 }}", 'uses %'),
    ('{{ 9 ** 9 ** 9 }}', r'uses \*\*'),
    ("{{ 'x' * 9999999999 }}", 'too large'),
    ('{{ [1] * 9999999999 }}', 'too large'),
    ('{{ tools | tojson(indent=99999) }}', 'indent above 16'),
    ("{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}", 'too long'),
    ("{{ (range(99999) | list) | join('x' * 1000000) }}", 'too long'),
    ("{% for i in range(99999) %}{{ 'x' * 1000000 }}{% endfor %}", 'writes more than'),
    (
      '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}',
      'takes more than 1000000 steps',
    ),
    ("{{ 1.5 | round(99999999, 'ceil') }}", 'round with a number above'),
    ('{% for x in [1] | batch(999999999, 0) %}{% endfor %}', 'batch with a number above'),
    ('{{ [1] | slice(999999999) | list }}', 'slice with a number above'),
    ("{{ ('a' * 40000) | replace('a', 'b' * 60000) }}", 'too long'),
    ("{{ ([0] * 50000) | tojson(separators=('x' * 50000, ':')) }}", 'separators of more than 16'),
    ("{{ strftime_now('%99999d' * 100) }}", 'date format of more than 100'),
    ("{{ 'a'.encode() * 5000000000 }}", 'SecurityError'),
    ('{{ (1).to_bytes(2000000000, "big") }}', 'SecurityError'),
    (
      "{% set s = 'a' * 4000000 %}{% for i in range(99999) %}{% set x = s[1:] %}{% endfor %}",
      '1 GB',
    ),
    (
      "{% for i in range(99999) %}{{ range(99999) | select('equalto', -1) | first }}{% endfor %}",
      'takes more than 0.5 s',
    ),
    (
      '{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}',
      'takes more than',
    ),
    (TWICE % ('(1,)', '{% set ns.x = (ns.x, ns.x) %}') + '{{ {ns.x: 1} }}', 'too large'),
    (TWICE % ("'aa'", '{% set ns.x = ns.x ~ ns.x %}'), 'too large'),
    (TWICE % ("'aa'", '{% set ns.x = ns.x + ns.x %}'), 'too large'),
    (TWICE % ('[1]', '{% set ns.x = [ns.x, ns.x] %}'), 'too large'),
    (TWICE % ('9', '{% set ns.x = ns.x * ns.x %}'), 'too large'),
    (
      TWICE % ("'aa'", '{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}'),
      'too large',
    ),
  ],
)
def test_broken_and_hostile_templates_are_one_sentence(source, message, monkeypatch):
  slow = 'takes more than' in message and 'steps' not in message
  monkeypatch.setattr(chat_sandbox, 'MAX_SECONDS', 0.5 if slow else 60)
  with pytest.raises(CheckpointError, match=f'the chat template of the checkpoint .*{message}'):
    ChatTemplate(source).render([USER])
