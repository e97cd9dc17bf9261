"""The page in headless Chromium: what people see, hear, and reach with the keyboard."""

import re

import pytest

from tests.server import browser, stub_server

browser.require()

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

FULL = 'The server is full: too many requests wait.'
TEXT = ''.join(text for text, _ in stub_server.TOKENS)


@pytest.fixture(scope='module')
def driver():
  with browser.chromium() as started:
    yield started


@pytest.fixture
def server():
  with stub_server.serving() as started:
    yield started


class Page:
  """The page as someone uses it. Reading an element waits until it is there."""

  def __init__(self, driver, server):
    self.driver, self.server = driver, server
    driver.get(server.url)
    self.wait_for(lambda: self.at('#model').text == 'palm_tiny')

  def wait_for(self, condition):
    return WebDriverWait(self.driver, 10, 0.02).until(lambda _: condition())

  def all(self, selector):
    return self.driver.find_elements(By.CSS_SELECTOR, selector)

  def at(self, selector):
    return self.wait_for(lambda: next(iter(self.all(selector)), None))

  def text(self, selector):
    return self.at(selector).get_property('textContent')

  @property
  def focused(self):
    return self.driver.switch_to.active_element

  def press(self, *keys):
    ActionChains(self.driver).send_keys(*keys).perform()

  def set(self, selector, text):
    field = self.at(selector)
    field.clear()
    field.send_keys(text)

  def ask(self, text='What is the capital of France?'):
    """Ask, and wait until the answer is done."""
    before = len(self.all('.foot'))
    self.at('#prompt').send_keys(text, Keys.ENTER)
    self.wait_for(lambda: len(self.all('.foot')) > before)

  def choose(self, mode):
    self.at(f'[value={mode}]').click()


@pytest.fixture
def page(driver, server):
  opened = Page(driver, server)
  yield opened
  # After every test: nothing was forbidden by the policy, nothing failed in a script.
  assert driver.execute_script('return window.violations') == []
  told = driver.get_log('browser')
  driver.get('about:blank')  # it asks this server nothing more
  assert [each for each in told if each['source'] != 'network'] == []


def test_policy_forbids_what_is_inline_or_from_elsewhere(page):
  """The check of every test, that nothing was forbidden, can fail."""
  page.driver.execute_script(
    'const style = document.createElement("style"); style.textContent = "p {}";'
    'document.head.append(style); new Image().src = "https://example.com/x.png"'
  )
  page.wait_for(lambda: len(page.driver.execute_script('return window.violations')) == 2)
  told = page.driver.execute_script('return window.violations.splice(0)')
  assert sorted(each.split()[0] for each in told) == ['img-src', 'style-src-elem']
  page.driver.get_log('browser')


def test_nothing_is_fetched_from_elsewhere(page):
  page.ask()
  entries = page.driver.execute_script(
    'return performance.getEntriesByType("resource").map(each => each.name)'
  )
  assert len(entries) > 5 and [e for e in entries if not e.startswith(page.server.url)] == []


def test_streams_a_chat(page):
  page.server.hold.clear()
  page.at('#prompt').send_keys('What is it?', Keys.ENTER)
  page.wait_for(lambda: page.text('.answer') == 'Paris')
  assert page.at('.turn').get_attribute('aria-busy') == 'true'
  assert page.at('#stop').is_displayed() and not page.at('#send').is_displayed()
  page.server.hold.set()
  page.wait_for(lambda: page.all('.foot'))
  assert page.text('.answer') == TEXT and page.at('.turn').get_attribute('aria-busy') is None
  assert page.text('.foot').startswith('6 tokensfirst after ') and 'tokens/s' in page.text('.foot')
  assert page.text('#spoken').startswith(TEXT)  # what a screen reader says
  page.ask('And now?')
  (path, first, key), (_, second, _) = page.server.bodies
  assert path == '/v1/chat/completions' and key is None
  assert first == {
    'messages': [{'role': 'user', 'content': 'What is it?'}],
    'temperature': 0.7,
    'top_p': 1,
    'top_k': 0,
    'max_tokens': 256,
    'logprobs': True,
    'top_logprobs': 5,
    'stream': True,
    'stream_options': {'include_usage': True},
  }
  assert second['messages'] == [
    {'role': 'user', 'content': 'What is it?'},
    {'role': 'assistant', 'content': TEXT},
    {'role': 'user', 'content': 'And now?'},
  ]


def test_continues_a_text(page):
  page.choose('completion')
  assert not page.at('#system').is_displayed()
  page.at('#prompt').send_keys('def main(', Keys.ENTER, 'x')  # Enter begins a line here
  page.at('#prompt').send_keys(Keys.CONTROL, Keys.ENTER)
  page.wait_for(lambda: page.all('.foot'))
  assert page.text('.answer') == f'def main(\nx{TEXT}'
  ((path, body, _),) = page.server.bodies
  assert path == '/v1/completions' and body['prompt'] == 'def main(\nx' and body['logprobs'] == 5


def test_sampling_options_are_sent(page):
  for selector, text in (
    ('#temperature', '0'),
    ('#top-p', '0.9'),
    ('#top-k', '40'),
    ('#max-tokens', '12'),
    ('#seed', '3'),
    ('#stop-texts', 'END\n\nnever '),
    ('#system', 'Be brief.'),
  ):
    page.set(selector, text)
  page.at('#receipt').click()
  page.ask()
  body = page.server.bodies[0][1]
  assert body['messages'][0] == {'role': 'system', 'content': 'Be brief.'}
  wanted = {'temperature': 0, 'top_p': 0.9, 'top_k': 40, 'max_tokens': 12, 'seed': 3}
  assert wanted.items() <= body.items() and body['stop'] == ['END', 'never ']
  assert body['receipt'] is True
  assert [each.text for each in page.all('.foot button')] == ['Copy', 'Receipt']


def test_an_option_out_of_its_range_is_not_sent(page):
  page.set('#top-p', '1.5')
  page.at('#prompt').send_keys('Hello', Keys.ENTER)
  page.wait_for(lambda: page.focused.get_attribute('id') == 'top-p')
  assert page.server.bodies == [] and page.at('#prompt').get_property('value') == 'Hello'


def test_html_of_the_model_is_text(page):
  page.ask('<i>me</i> too')
  assert page.text('.asked') == '<i>me</i> too' and '<img src=x onerror' in page.text('.answer')
  assert page.all('.answer img, .answer b, .asked i') == []
  assert page.driver.title == 'palm_tiny · t5x_inference_ext'


def test_pointing_at_a_token_tells_its_log_probability(page):
  page.ask()
  assert not page.at('#readout').is_displayed()
  tokens = page.all('.token')
  assert [token.get_property('textContent') for token in tokens] == [
    text for text, _ in stub_server.TOKENS
  ]
  ActionChains(page.driver).move_to_element(tokens[1]).perform()
  page.wait_for(lambda: page.at('#readout').is_displayed())
  assert page.text('#readout-token') == '␣is' and page.text('#readout-probability') == '67.0%'
  assert page.text('#readout-details') == 'log-probability −0.400'
  rows = [row.text.split() for row in page.all('#readout-others tbody tr')]
  assert rows == [['␣is', '67.0%'], ['↵', '1.8%']]
  shades = [re.search(r'p(\d)', token.get_attribute('class'))[1] for token in tokens]
  assert shades == ['0', '2', '5', '6', '3', '0']  # of -0.02, -0.4, -3.1, -5.2, -0.9, -0.001


def test_keyboard_alone(page):
  """From the prompt to the answer, through its tokens, and back."""
  assert page.focused.get_attribute('id') == 'prompt'
  page.press('What is it?', Keys.ENTER)
  page.wait_for(lambda: page.all('.foot'))
  assert page.focused.get_attribute('id') == 'prompt'
  for _ in range(3):  # past the answer's button
    ActionChains(page.driver).key_down(Keys.SHIFT).send_keys(Keys.TAB).key_up(Keys.SHIFT).perform()
    if 'answer' in page.focused.get_attribute('class').split():
      break
  assert page.focused.get_attribute('class') == 'answer'
  assert page.driver.execute_script(
    'return getComputedStyle(document.activeElement).outlineStyle !== "none"'
  )
  page.press(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
  assert page.text('#spoken') == ('Token 2 of 6: ␣is. Probability 67.0%, log-probability −0.400.')
  assert page.at('#readout').is_displayed() and page.text('.current') == ' is'
  page.press(Keys.END)
  assert page.text('#readout-probability') == '99.90%'
  page.press(Keys.ESCAPE)
  assert not page.at('#readout').is_displayed()


def test_every_control_has_a_name(page):
  page.ask()
  page.driver.execute_script('document.getElementById("connection").open = true')
  controls = page.all('button, input, textarea, summary, progress, svg')
  names = [each.accessible_name for each in controls if each.is_displayed()]
  assert len(names) > 15 and all(names)


def test_stop_ends_the_request(page):
  page.server.hold.clear()
  page.at('#prompt').send_keys('Go on', Keys.ENTER)
  page.wait_for(lambda: page.text('.answer') == 'Paris')
  page.at('#stop').click()
  page.wait_for(lambda: page.all('.foot'))
  assert 'stopped by you' in page.text('.foot') and page.text('.answer') == 'Paris'
  assert page.focused.get_attribute('id') == 'prompt'
  assert page.server.aborted.wait(5)  # the server notices: it frees the slot


@pytest.mark.parametrize(
  ('status', 'headers', 'words'),
  [
    (429, [('Retry-After', '7')], f'{FULL} It asks to wait 7 s.'),
    (401, [], 'The server asks for an API key. Write it under “Connection”, and send again.'),
    (503, [], 'The server takes no new requests now.'),
    (413, [], 'This is more text than the server takes.'),
    (400, [], 'top_p must be above 0'),
  ],
)
def test_errors_are_told_in_words(page, status, headers, words):
  page.server.failures = [(status, {'error': {'message': 'top_p must be above 0'}}, headers)]
  page.at('#prompt').send_keys('Hello', Keys.ENTER)
  told = page.at('.failed')
  assert told.get_attribute('role') == 'alert' and page.text('.failed p') == words
  assert 'top_p must be above 0' in told.text
  page.at('.failed button').click()  # try again
  page.wait_for(lambda: page.all('.foot'))
  assert page.all('.failed') == [] and page.text('.answer') == TEXT
  assert [body['messages'] for _, body, _ in page.server.bodies] == [
    [{'role': 'user', 'content': 'Hello'}]
  ] * 2


def test_an_answer_that_breaks_off_is_told(page):
  page.server.tokens = [('Par', -0.1), (object(), 0)]  # the stub fails at the second
  page.at('#prompt').send_keys('Hello', Keys.ENTER)
  assert 'before the answer was whole' in page.at('.failed').text
  assert page.text('.answer') == 'Par'


def test_key_is_sent_and_stays_in_the_tab(page):
  page.driver.execute_script('document.getElementById("connection").open = true')
  page.at('#key').send_keys('secret', Keys.TAB)
  page.ask()
  assert page.server.bodies[0][2] == 'Bearer secret'
  assert page.driver.execute_script('return [localStorage.length, document.cookie]') == [0, '']
  page.driver.execute_script('sessionStorage.clear()')


def test_characters_of_several_tokens_and_text_held_back(page):
  """Text and tokens need not come together: a span then has several tokens, none is lost."""
  script = """
    const {TokenText} = await import('./tokens.js');
    const box = document.createElement('div');
    const text = new TokenText(box);
    const token = (text, logProb) => ({text, logProb, others: []});
    text.add('', [token('bytes:\\\\xe2', -1)]);
    text.add('│', [token('bytes:\\\\x94\\\\x82', -0.5)]);
    text.add('', [token('he', -0.25)]);
    text.add('hello', [token('llo', -0.75)]);
    text.add(' end', []);
    return [box.textContent, [...box.children].map(each => each.textContent), text.text];
  """
  found = page.driver.execute_async_script(
    f'const done = arguments[0]; (async () => {{ {script} }})().then(done, e => done(String(e)))'
  )
  assert found == ['│hello end', ['│', 'he', 'llo'], '│hello end']


def test_engine_beside_it(page):
  wanted = {
    '#state': 'ready',
    '#rate': '42',
    '#slots': '3 of 8',
    '#waiting': '2',
    '#first-token': '118 ms',
    '#prefixes': '22 of 40 (55%)',
    '#pages': '24 of 64',
    '#mesh': '2x2x2',
    '#prefill-layout': 'wg_xyz/batch',
    '#decode-layout': 'ws_2d/batch',
    '#weights': 'int8, computed in bfloat16',
    '#cache': 'int8',
    '#uptime': '1 h 2 min',
  }
  assert {selector: page.text(selector) for selector in wanted} == wanted
  assert len(page.all('#squares i')) == 8 and len(page.all('#squares .used')) == 3
  page.server.status |= {'state': 'draining', 'slots': {'used': 1, 'total': 8}, 'waiting': None}
  page.wait_for(lambda: page.text('#state') == 'shutting down')
  assert page.text('#slots') == '1 of 8' and len(page.all('#squares .used')) == 1
  assert page.text('#waiting') == '–'


def test_a_model_without_a_chat_template_is_offered_completions(driver, server):
  server.status['chat'] = False
  page = Page(driver, server)
  page.wait_for(lambda: page.text('#send') == 'Continue')
  assert not page.at('[value=chat]').is_enabled() and page.at('[value=completion]').is_selected()


def _luminance(colour):
  channels = [int(each) / 255 for each in re.findall(r'\d+', colour)[:3]]
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
  return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


def _contrast(a, b):
  darker, lighter = sorted((_luminance(a), _luminance(b)))
  return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_text_can_be_read_in_light_and_dark(page, scheme):
  """WCAG's 4.5 for text, on the ground and on each colour of a token."""
  browser.set_media(page.driver, prefers_color_scheme=scheme)
  names = ['ground', 'sheet', 'wash', 'p1', 'p2', 'p3', 'p4', 'p5', 'p6']
  script = """
    const probe = document.body.appendChild(document.createElement('p'));
    const colours = arguments[0].map(name => {
      probe.style.color = `var(--${name})`;
      return getComputedStyle(probe).color;
    });
    probe.remove();
    return colours;
  """
  ink, quiet, bad, bad_wash, accent, on_accent, *grounds = page.driver.execute_script(
    script, ['ink', 'quiet', 'bad', 'bad-wash', 'accent', 'on-accent', *names]
  )
  assert (_luminance(ink) > _luminance(grounds[0])) == (scheme == 'dark')
  pairs = [(ink, ground) for ground in grounds]
  pairs += [(quiet, ground) for ground in (*grounds[:2], bad_wash)]
  pairs += [(bad, bad_wash), (on_accent, accent), (accent, grounds[2])]
  assert [pair for pair in pairs if _contrast(*pair) < 4.5] == []
  browser.set_media(page.driver, prefers_color_scheme='light')


def test_a_phone_needs_no_scrolling_sideways(page):
  browser.set_size(page.driver, 360, 740)
  try:
    page.ask('A question with a_very_long_name_' + 'x' * 80)
    width = page.driver.execute_script('return document.documentElement.scrollWidth')
    assert width <= 360
    prompt = page.at('#prompt').rect
    scrolled = page.driver.execute_script('return scrollY')
    assert prompt['y'] - scrolled + prompt['height'] <= 740, 'the prompt is at hand'
  finally:
    page.driver.execute_cdp_cmd('Emulation.clearDeviceMetricsOverride', {})
