"""Headless Chromium, driven by selenium: Debian's packages chromium and chromium-driver."""

import contextlib
import importlib.util
import shutil
import tempfile

import pytest

_SWITCHES = (
  'headless',
  'no-sandbox',
  'disable-gpu',
  'disable-quic',
  'no-first-run',
  'disable-background-networking',
  'disable-component-update',
  'disable-sync',
)
# What the page's policy forbids is told here, before any script of the page runs.
_LISTEN = """
window.violations = [];
document.addEventListener('securitypolicyviolation', event => {
  window.violations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""


def missing_browser():
  """Return why there is no browser to test with, or None if there is one."""
  if importlib.util.find_spec('selenium') is None:
    return 'selenium is not installed (extra `test`)'
  for program in ('chromium', 'chromedriver'):
    if shutil.which(program) is None:
      return f'there is no {program}: install the packages chromium and chromium-driver'
  return None


def require():
  """Skip the calling module where there is no browser, which pip can't install; say what lacks."""
  if (missing := missing_browser()) is not None:
    pytest.skip(f'the page is tested in a browser: {missing}', allow_module_level=True)


@contextlib.contextmanager
def chromium(width=1280, height=860):
  """Start Chromium with a new profile; yield its driver."""
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  options.binary_location = shutil.which('chromium')
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  for switch in (*_SWITCHES, f'window-size={width},{height}'):
    options.add_argument(f'--{switch}')
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    options.add_argument(f'--user-data-dir={profile}')
    service = webdriver.ChromeService(shutil.which('chromedriver'))
    driver = webdriver.Chrome(options, service)
    try:
      command = 'Page.addScriptToEvaluateOnNewDocument'
      driver.execute_cdp_cmd(command, {'source': _LISTEN})
      yield driver
    finally:
      driver.quit()


def set_media(driver, **features):
  """Set media features, such as prefers_color_scheme='dark'."""
  listed = [{'name': n.replace('_', '-'), 'value': value} for n, value in features.items()]
  driver.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': listed})


def set_size(driver, width, height):
  """Set the size of the page, also below the least width of a window."""
  size = {'width': width, 'height': height, 'deviceScaleFactor': 1, 'mobile': False}
  driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', size)
