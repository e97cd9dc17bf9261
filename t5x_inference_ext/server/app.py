"""The server as an ASGI application: its routes, and the checks before them."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
import functools
import importlib.resources
import time
import traceback
from typing import Any

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from t5x_inference_ext import __version__
from t5x_inference_ext.server import generation
from t5x_inference_ext.server.api_errors import ApiError, invalid
from t5x_inference_ext.server.bodies import DetokenizeBody, TokenizeBody, validated
from t5x_inference_ext.server.body_reading import read_body
from t5x_inference_ext.server.service import Service

# Paths that need no key, because their answers reveal nothing about clients.
_OPEN = ('/health', '/metrics', '/version', '/status')
# Paths that monitors request every few seconds; such requests are not logged.
_QUIET = ('/health', '/metrics', '/status')
_MOST_TRACEBACK = 4000  # characters of a traceback in the log
_PAGE_TYPES = {
  '.html': 'text/html; charset=utf-8',
  '.js': 'text/javascript; charset=utf-8',
  '.css': 'text/css; charset=utf-8',
  '.svg': 'image/svg+xml',
}
_POLICY = (
  "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
  "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
)
_HEADERS = {'x-content-type-options': 'nosniff', 'referrer-policy': 'no-referrer'}
_Handler = Callable[[Service, Request], Awaitable[Any]]


def make_app(service: Service) -> ASGIApp:
  """Return the ASGI application for a service."""
  page = _page_files()

  def route(path: str, handler: _Handler, method: str = 'GET') -> Route:
    async def endpoint(request: Request) -> Any:
      return await handler(service, request)

    return Route(path, endpoint, methods=[method])

  async def page_file(service: Service, request: Request) -> Response:
    data, kind = page[request.url.path]
    headers = {'content-security-policy': _POLICY, 'cache-control': 'no-cache'}
    return Response(data, media_type=kind, headers=headers)

  routes = [
    route('/v1/completions', generation.complete, 'POST'),
    route('/v1/chat/completions', generation.chat, 'POST'),
    route('/v1/models', _models),
    route('/v1/models/{name:path}', _model),
    route('/tokenize', _tokenize, 'POST'),
    route('/detokenize', _detokenize, 'POST'),
    route('/health', _health),
    route('/metrics', _metrics),
    route('/version', _version),
    route('/status', _status),
    *(route(path, page_file) for path in page),
  ]
  handlers: Mapping[Any, Any] = {
    ApiError: _error_response,
    HTTPException: _told_by_starlette,
    ClientDisconnect: _left,
    Exception: _failed,
  }
  return _Gate(Starlette(routes=routes, exception_handlers=handlers), service, set(page))


class _Gate:
  """ASGI middleware: checks key and Host header before any route; logs each request at its end."""

  def __init__(self, app: ASGIApp, service: Service, page: set[str]) -> None:
    self._app, self._service, self._page = app, service, page

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    begin, path = time.monotonic(), scope['path']
    headers = Headers(scope=scope)
    address = (scope.get('client') or ('', 0))[0]
    record: dict[str, Any] = {}
    scope['state'] = {'record': record, 'client': address}

    whole = False

    async def send_noted(message: Message) -> None:
      nonlocal whole
      whole = message['type'] == 'http.response.body' and not message.get('more_body')
      if message['type'] == 'http.response.start':
        record['status'] = message['status']
        message['headers'] = [
          *message['headers'],
          *((name.encode(), value.encode()) for name, value in _HEADERS.items()),
        ]
      await send(message)

    try:
      try:
        self._service.hosts.check(headers.get('host', ''))
        if path not in _OPEN and path not in self._page:
          scope['state']['client'] = self._service.keys.client(headers) or address
      except ApiError as error:
        response = JSONResponse(error.body, error.status, error.headers)
        await response(scope, receive, send_noted)
        return
      await self._app(scope, receive, send_noted)
    except Exception:  # any error: log it, so that other requests go on
      record['traceback'] = traceback.format_exc()[-_MOST_TRACEBACK:]
      if not whole:
        raise  # the connection is closed
    finally:
      if path not in _QUIET and path not in self._page:
        self._service.log.write(
          method=scope['method'],
          path=path[:100],
          client=scope['state']['client'],
          seconds=time.monotonic() - begin,
          **record,
        )


async def _models(service: Service, request: Request) -> Response:
  cards = [_card(service, name) for name in service.models]
  return JSONResponse({'object': 'list', 'data': cards})


async def _model(service: Service, request: Request) -> Response:
  name = request.path_params['name']
  service.check_model(name)
  return JSONResponse(_card(service, name))


def _card(service: Service, name: str) -> dict[str, Any]:
  """Return the description of the model, or of an adapter with the model as its parent."""
  return {
    'id': name,
    **({} if name == service.name else {'parent': service.name}),
    'object': 'model',
    'created': service.began,
    'owned_by': 't5x_inference_ext',
    'max_model_len': service.translator.max_length,
  }


async def _tokenize(service: Service, request: Request) -> Response:
  body = await read_body(
    request, service.options.max_body_bytes, functools.partial(validated, TokenizeBody)
  )
  service.check_model(body.model)
  translator = service.translator

  def encode() -> list[int]:
    if body.messages is not None:
      return list(translator.chat_ids(body.messages, body.tools, body.chat_template_kwargs))
    bos = translator.bos if body.add_special_tokens is not False else ()
    return [*bos, *translator.prompt_ids(body.prompt or '')]

  tokens = await asyncio.to_thread(encode)
  return JSONResponse(
    {'tokens': tokens, 'count': len(tokens), 'max_model_len': translator.max_length}
  )


async def _detokenize(service: Service, request: Request) -> Response:
  body = await read_body(
    request, service.options.max_body_bytes, functools.partial(validated, DetokenizeBody)
  )
  service.check_model(body.model)
  vocabulary = service.translator.vocabulary
  if vocabulary is None:
    raise invalid('the vocabulary of this model is not known', 'tokens')

  def decode() -> str:
    return vocabulary.decode(service.translator.prompt_ids(body.tokens, 'tokens'))

  return JSONResponse({'prompt': await asyncio.to_thread(decode)})


async def _health(service: Service, request: Request) -> Response:
  service.check_open()
  return JSONResponse({'status': 'ready'})


async def _metrics(service: Service, request: Request) -> Response:
  return Response(service.metrics.text(), media_type='text/plain; version=0.0.4; charset=utf-8')


async def _version(service: Service, request: Request) -> Response:
  return JSONResponse({'version': __version__})


async def _status(service: Service, request: Request) -> Response:
  return JSONResponse(service.status())


def _error_response(request: Request, error: Exception) -> Response:
  assert isinstance(error, ApiError)
  request.scope['state']['record']['error'] = error.message
  return JSONResponse(error.body, error.status, error.headers)


def _told_by_starlette(request: Request, error: Exception) -> Response:
  assert isinstance(error, HTTPException)
  what = {404: 'there is no such path', 405: f'{request.method} is not for this path'}
  message = what.get(error.status_code, str(error.detail))
  found = ApiError(error.status_code, message, headers=error.headers)
  return _error_response(request, found)


def _left(request: Request, error: Exception) -> Response:
  request.scope['state']['record']['left'] = True
  return Response(status_code=499)  # the client has left: the status is only for the log


def _failed(request: Request, error: Exception) -> Response:
  kind = type(error).__name__
  request.scope['state']['record']['error'] = f'{kind}: {error}'[:500]
  found = ApiError(500, f'the server failed ({kind}); its log says more', code='internal_error')
  return JSONResponse(found.body, found.status)


def _page_files() -> dict[str, tuple[bytes, str]]:
  """Read the status page's files; return path -> (content, type)."""
  folder = importlib.resources.files('t5x_inference_ext.server') / 'page'
  found = {}
  if folder.is_dir():
    for file in folder.iterdir():
      kind = _PAGE_TYPES.get(file.name[file.name.rfind('.') :])
      if kind is not None:
        path = '/' if file.name == 'index.html' else f'/{file.name}'
        found[path] = file.read_bytes(), kind
  return found
