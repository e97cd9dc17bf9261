"""The two routes that generate: completions and chats."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
import contextlib
import functools
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp

from t5x_inference_ext.engine import request as engine_request
from t5x_inference_ext.engine.admission import CheckedRequest
from t5x_inference_ext.engine.request import SampleCollector
from t5x_inference_ext.errors import UserError
from t5x_inference_ext.server.answers import HttpAnswer
from t5x_inference_ext.server.api_errors import invalid
from t5x_inference_ext.server.bodies import ChatBody, CompletionBody, GenerationBody, validated
from t5x_inference_ext.server.body_reading import read_body
from t5x_inference_ext.server.forms import ChatForm, CompletionForm, usage
from t5x_inference_ext.server.lockstep import PromptToScore
from t5x_inference_ext.server.receipts import ReceiptWriter
from t5x_inference_ext.server.response_formats import grammar_of
from t5x_inference_ext.server.service import Service
from t5x_inference_ext.server.streaming import EventStream
from t5x_inference_ext.server.translation import first_seed, refused, size_of
from t5x_inference_ext.server.waiting import Deadline, in_time

# Prompts of more bytes are tokenized in another thread, so that the event loop is not blocked.
SHORT = 4096
_Requests = Sequence[engine_request.Request]
_Form = CompletionForm | ChatForm


async def complete(service: Service, request: Request) -> ASGIApp:
  """Answer POST /v1/completions."""
  service.check_open()
  body = await read_body(
    request, service.options.max_body_bytes, functools.partial(validated, CompletionBody)
  )
  _check_body(service, body)
  prompts, translator = body.prompts, service.translator
  if service.options.log_prompts:
    request.state.record.update(prompts=prompts)

  def requests() -> _Requests:
    seed, found = first_seed(body), []
    # With max_tokens 0 nothing is generated, but the request is checked like one for 1 token.
    checked = body.model_copy(update={'max_tokens': 1}) if body.max_tokens == 0 else body
    for i, prompt in enumerate(prompts):
      param = 'prompt' if len(prompts) == 1 else f'prompt[{i}]'
      tokens = [*translator.bos, *translator.prompt_ids(prompt, param)]
      found.append(translator.request(checked, tokens, body.logprobs or 0, param, seed))
    return found

  async def form(found: _Requests) -> _Form:
    ids = [translator.given_tokens(each)[len(translator.bos) :] for each in found]
    echoes: list[tuple[str, dict[str, Any] | None]] = []
    if body.echo:
      echoes = await asyncio.gather(
        *(_echo(service, body, prompt, each) for prompt, each in zip(prompts, found))
      )
    return CompletionForm(body, body.model or service.name, service.texts, echoes, ids)

  sizes = [size_of(prompt) for prompt in prompts]
  return await _answer(service, request, body, sizes, requests, form, sum(sizes) > SHORT)


async def chat(service: Service, request: Request) -> ASGIApp:
  """Answer POST /v1/chat/completions."""
  service.check_open()
  body, messages, size = await read_body(request, service.options.max_body_bytes, _chat_of)
  _check_body(service, body)
  if service.options.log_prompts:
    request.state.record.update(prompts=messages)

  def requests() -> _Requests:
    tools = None if body.tool_choice == 'none' else body.tools
    tokens = service.translator.chat_ids(body.messages, tools, body.chat_template_kwargs)
    top = body.top_logprobs or 0
    return [service.translator.request(body, tokens, top, 'messages', first_seed(body))]

  async def form(found: _Requests) -> _Form:
    del found
    return ChatForm(body, body.model or service.name, service.texts)

  # Render in another thread, since a template may take long even for short messages.
  return await _answer(service, request, body, [size], requests, form, in_thread=True)


def _chat_of(value: Any) -> tuple[ChatBody, list[dict[str, Any]], int]:
  """Return a chat's body, its messages as JSON, and their size with that of the tools."""
  body = validated(ChatBody, value)
  messages = [message.model_dump(exclude_none=True) for message in body.messages]
  return body, messages, size_of(messages) + size_of(body.tools)


def _check_body(service: Service, body: GenerationBody) -> None:
  """Raise ApiError for errors in the body that can be found before tokenization."""
  service.check_model(body.model)
  service.translator.sampling(body)
  grammar_of(body.response_format)
  if body.stops and service.translator.vocabulary is None:
    raise invalid('stop needs a vocabulary, and that of this model is not known', 'stop')


async def _echo(
  service: Service, body: CompletionBody, prompt: str | list[int], found: engine_request.Request
) -> tuple[str, dict[str, Any] | None]:
  """Return a prompt's text and, if requested, the log-probabilities of its tokens."""
  translator = service.translator
  ids = translator.given_tokens(found)[len(translator.bos) :]
  text = prompt if isinstance(prompt, str) else ''
  if not isinstance(prompt, str) and translator.vocabulary is not None:
    text = translator.vocabulary.decode(ids)
  if body.logprobs is None:
    return text, None
  ranked = await service.driver.score(PromptToScore(found.tokens, body.logprobs, found.adapter))
  # Without BOS, a prompt's first token has no log-probability, because no token precedes it.
  unknown = [None] * (len(ids) - len(ranked.log_probs))
  log_probs, top = [*unknown, *ranked.log_probs], [*unknown, *ranked.top]
  return text, service.texts.completion(ids, log_probs, top, 0, body.logprobs)


async def _answer(
  service: Service,
  request: Request,
  body: GenerationBody,
  sizes: list[int],
  requests: Callable[[], _Requests],
  make_form: Callable[[_Requests], Coroutine[Any, Any, _Form]],
  in_thread: bool,
) -> ASGIApp:
  """Answer a request with a whole answer or a stream.

  Args:
    service: The server's parts.
    request: The HTTP request, whose body was read.
    body: The request's body.
    sizes: Size of each prompt in tokens, or bytes of text, for the limits on waiting prompts.
    requests: Function that tokenizes the prompts and returns a Request for each.
    make_form: Function that returns the answer's form, given its requests.
    in_thread: Whether to tokenize the prompts in another thread.
  """
  options, record = service.options, request.state.record
  record.update(stream=bool(body.stream), n=body.choices)
  deadline = Deadline.after(min(body.timeout or options.request_timeout, options.request_timeout))

  async def begin() -> _Form:
    """Tokenize, check and queue the prompts; return the form of the answer."""

    def check() -> list[CheckedRequest]:
      if answer.closed:  # closed while the request waited for a thread
        raise ClientDisconnect
      try:
        return [service.scheduler.check(each) for each in requests()]
      except UserError as error:  # for example the extra [structured] is not installed
        raise refused(error) from None

    # Compiling a grammar may take seconds.
    slow = in_thread or body.response_format is not None
    checked = await asyncio.to_thread(check) if slow else check()
    found = [each.request for each in checked]
    answer.prompt_tokens = sum(len(service.translator.given_tokens(each)) for each in found)
    if body.receipt or request.headers.get('x-receipt') == '1':
      driver = service.driver
      answer.receipt = ReceiptWriter(service.make_receipt, found, driver.now, answer.arrived)
    form = await make_form(found)
    record.update(id=form.id)
    if body.max_tokens == 0:
      answer.finish_at_once(len(found), body.choices)
    else:
      answer.submit(checked, at_once=bool(body.stream))
    return form

  async def whole() -> dict[str, Any]:
    """Return the whole answer."""
    form = await begin()
    collector, samples = SampleCollector(), {}
    for number in range(len(sizes)):
      collector.expect(number, body.choices)
    async for events in answer.events():
      for number, event in events:
        ended = collector.add(event._replace(request=number))
        if ended is not None:
          samples[number] = ended
    ordered = [samples[number] for number in range(len(sizes))]
    answered = form.whole(ordered, usage(answer.prompt_tokens, answer.new_tokens))
    if answer.receipt is not None:
      answered['receipt'] = await answer.receipt.receipt(ordered[0])
    return answered

  with contextlib.ExitStack() as stack:
    answer = HttpAnswer(
      service.driver,
      service.bounds,
      service.metrics,
      sizes,
      request.state.client,
      options.log_prompts,
    )
    stack.callback(answer.close)
    service.answers.add(answer)
    stack.callback(service.answers.discard, answer)
    stack.callback(lambda: record.update(answer.summary()))
    if not body.stream:
      return JSONResponse(await in_time(request.receive, whole(), deadline))
    form = await in_time(request.receive, begin(), deadline)
    return EventStream(body, answer, form, len(sizes), deadline, stack.pop_all())
