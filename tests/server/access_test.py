import pytest

from t5x_inference_ext.errors import RequestError
from t5x_inference_ext.server.access import Hosts, Keys, is_loopback, read_keys
from t5x_inference_ext.server.api_errors import ApiError
from t5x_inference_ext.server.options import ServerOptions


class TestKeys:
  @pytest.mark.parametrize('header', ['Bearer one', 'bearer one', 'Bearer  one '])
  def test_a_known_key(self, header):
    assert Keys(['two', 'one']).client({'authorization': header}) == 'key 1'

  def test_a_key_that_is_not_ascii(self):
    sent = 'Bearer schlüssel'.encode().decode('latin-1')  # as the HTTP server hands it over
    assert Keys(['schlüssel']).client({'authorization': sent}) == 'key 0'

  @pytest.mark.parametrize(
    'headers', [{}, *({'authorization': h} for h in ('one', 'Basic one', 'Bearer on', 'Bearer '))]
  )
  def test_an_unknown_key(self, headers):
    with pytest.raises(ApiError) as error:
      Keys(['one', 'two']).client(headers)
    assert error.value.status == 401 and error.value.headers == {'www-authenticate': 'Bearer'}

  def test_without_keys_all_are_let_in(self):
    assert Keys([]).client({}) is None

  def test_from_options_and_a_file(self, tmp_path):
    file = tmp_path / 'keys'
    file.write_text('# ours\none\n\n two \n')
    assert read_keys(ServerOptions(api_key_file=str(file))) == ['one', 'two']
    assert read_keys(ServerOptions(api_key='x', api_key_file=str(file))) == ['x', 'one', 'two']
    assert read_keys(ServerOptions()) == []

  @pytest.mark.parametrize('text, says', [('', 'holds no key'), (None, "can't read api_key_file")])
  def test_a_file_that_cannot_be_meant(self, text, says, tmp_path):
    file = tmp_path / 'keys'
    if text is not None:
      file.write_text(text)
    with pytest.raises(RequestError, match=says):
      read_keys(ServerOptions(api_key_file=str(file)))

  def test_an_empty_key(self):
    with pytest.raises(RequestError, match='api_key is empty'):
      read_keys(ServerOptions(api_key=''))


class TestHosts:
  @pytest.mark.parametrize(
    'header', ['localhost', 'LOCALHOST:8000', '127.0.0.1:8000', '[::1]:8000', '[::1]', 'me.org:1']
  )
  def test_names_of_this_machine(self, header):
    Hosts(ServerOptions(allowed_host=('Me.org',))).check(header)

  @pytest.mark.parametrize(
    'header', ['', 'evil.org', 'localhost.evil.org', '10.0.0.1:8000', '::1:x']
  )
  def test_other_names(self, header):
    with pytest.raises(ApiError) as error:
      Hosts(ServerOptions()).check(header)
    assert error.value.status == 403

  def test_at_other_addresses_all_names_are_taken_unless_some_are_given(self):
    Hosts(ServerOptions(host='0.0.0.0')).check('whoever.org')
    with pytest.raises(ApiError):
      Hosts(ServerOptions(host='0.0.0.0', allowed_host=('me.org',))).check('whoever.org')

  @pytest.mark.parametrize(
    'host, expected',
    [('127.0.0.1', True), ('127.9.9.9', True), ('::1', True), ('localhost', True)]
    + [('0.0.0.0', False), ('10.0.0.1', False), ('example.org', False)],
  )
  def test_loopback(self, host, expected):
    assert is_loopback(host) is expected
