"""The page over a real engine: the text and log-probabilities on it are the engine's own."""

import re

import pytest

from t5x_inference_ext.engine.engine import Engine
from t5x_inference_ext.runs.infer_options import InferOptions
from t5x_inference_ext.server.launch import make_served, make_service
from t5x_inference_ext.server.options import ServerOptions
from t5x_inference_ext.text.settings import assumed_settings
from tests.server import browser
from tests.server.running import running, until

browser.require()

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

pytestmark = pytest.mark.usefixtures('quick_programs')

OPTIONS = ServerOptions(port=0, model_name='palm_tiny', max_length=64, api_key='secret')


@pytest.fixture(scope='module')
def engine(palm_tiny):
  return Engine.load(palm_tiny, mesh='1x1x1', dtype='float32', scan_layers=True)


@pytest.fixture(scope='module')
def service(engine, palm_tiny):
  settings = assumed_settings(384)
  model = InferOptions(checkpoint=str(palm_tiny), batch_size=2, dtype='float32', prefill_chunk=16)
  served = make_served(engine, settings, model, OPTIONS)
  return make_service(served, settings, OPTIONS)


@pytest.fixture
def driver(service):
  with running(service) as url, browser.chromium() as driver:
    driver.get(url)
    yield driver
    assert driver.execute_script('return window.violations') == []
    told = [each for each in driver.get_log('browser') if each['source'] != 'network']
    driver.get('about:blank')
    assert told == []


def test_a_completion_on_the_page(driver, service, engine):
  def at(selector):
    found = driver.find_elements(By.CSS_SELECTOR, selector)
    return found[0].get_property('textContent') if found else None

  # palm_tiny has no chat template; the key is wrong at first.
  until(lambda: at('#send') == 'Continue')
  prompt = driver.find_element(By.ID, 'prompt')
  prompt.send_keys('def main(', Keys.CONTROL, Keys.ENTER)
  until(lambda: at('.failed p'))
  assert at('.failed p').startswith('The server asks for an API key.')
  driver.execute_script('document.getElementById("connection").open = true')
  driver.find_element(By.ID, 'key').send_keys('secret', Keys.TAB)
  for field, text in (('temperature', '0'), ('max-tokens', '8')):
    driver.find_element(By.ID, field).clear()
    driver.find_element(By.ID, field).send_keys(text)
  driver.find_element(By.CSS_SELECTOR, '.failed button').click()  # try again
  until(lambda: at('.foot'))

  (row,) = engine.generate(['def main('], max_new_tokens=8, eos_id=-1)
  assert at('.answer') == f'def main({row.text}'
  ids = engine.checkpoint.vocabulary.encode('def main(')
  (log_probs,) = engine.score_completions([(ids, row.tokens)])
  answer = driver.find_element(By.CLASS_NAME, 'answer')
  assert len(log_probs) == 8
  for i, log_prob in enumerate(log_probs):
    answer.send_keys(Keys.ARROW_RIGHT)
    spoken = at('#spoken').replace('−', '-')
    found = re.fullmatch(
      r'Token (\d) of 8: .*\. Probability .*%, log-probability (-?[\d.]+)\.', spoken
    )
    assert int(found[1]) == i + 1 and float(found[2]) == pytest.approx(log_prob, abs=0.001)
    assert len(driver.find_elements(By.CSS_SELECTOR, '#readout-others tr')) == 5
  until(lambda: at('#slots') == '0 of 2')
  assert at('#model') == 'palm_tiny' and at('#mesh') == '1x1x1'
  until(lambda: at('#prefixes') == '0 of 1 (0%)')
