// The server's API: requests with the key, errors in words, answers as events.

let key = sessionStorage.getItem('key') ?? '';

export function setKey(text) {
  key = text.trim();
  if (key) sessionStorage.setItem('key', key);
  else sessionStorage.removeItem('key');
}

export const getKey = () => key;

const headers = () => (key ? {authorization: `Bearer ${key}`} : {});

/** An error of the API. `message` says what to do, `detail` is the server's own sentence. */
export class ApiError extends Error {
  constructor(message, detail = '') {
    super(message);
    this.detail = detail === message ? '' : detail;
  }
}

const UNREACHABLE = 'The server does not answer. Is it still running?';

/** Return the ApiError that a status other than 200 stands for. */
function explain(status, detail, wait) {
  const again = wait ? ` It asks to wait ${wait} s.` : '';
  switch (status) {
    case 401:
      return new ApiError(key
        ? 'The server does not know this API key. Change it under “Connection”.'
        : 'The server asks for an API key. Write it under “Connection”, and send again.', detail);
    case 413:
      return new ApiError('This is more text than the server takes.', detail);
    case 429:
      return new ApiError(`The server is full: too many requests wait.${again}`, detail);
    case 503:
      return new ApiError(`The server takes no new requests now.${again}`, detail);
  }
  return new ApiError(detail || `The server answered with status ${status}.`);
}

/** Return a JSON answer's error sentence, or ''. */
async function sentenceOf(response) {
  try {
    const {error, detail} = await response.json();
    return String(error?.message ?? error ?? detail ?? '');
  } catch {
    return '';
  }
}

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new ApiError(UNREACHABLE);
  }
  if (!response.ok) {
    const wait = Number.parseInt(response.headers.get('retry-after') ?? '', 10);
    throw explain(response.status, await sentenceOf(response), wait);
  }
  return response;
}

/** Return what the engine does now. */
export async function readStatus() {
  return (await send('status', {headers: headers(), cache: 'no-store'})).json();
}

/** Yield the data of each server-sent event of a response. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = '';
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === 'AbortError') throw error;
      throw new ApiError('The connection broke before the answer was whole.');
    }
    if (part.done) return;
    buffer = (buffer + part.value).replaceAll('\r\n', '\n');
    const blocks = buffer.split('\n\n');
    buffer = blocks.pop();
    for (const block of blocks) {
      const data = block.split('\n').filter(line => line.startsWith('data:'));
      if (data.length) yield data.map(line => line.slice(5).trimStart()).join('\n');
    }
  }
}

/** Yield a streamed answer as {text, tokens, finish, usage, receipt}, for either endpoint.
 *
 * Each token is {text, logProb, others}; `others` are the most likely tokens, [text, logProb] each.
 */
export async function* answer(path, body, signal) {
  const response = await send(path, {
    method: 'POST',
    headers: {...headers(), 'content-type': 'application/json'},
    body: JSON.stringify({...body, stream: true, stream_options: {include_usage: true}}),
    signal,
  });
  for await (const data of events(response)) {
    if (data === '[DONE]') return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(String(chunk.error.message ?? 'The request failed.'));
    const choice = chunk.choices?.[0];
    yield {
      text: choice?.delta?.content ?? choice?.text ?? '',
      tokens: choice?.logprobs ? tokensOf(choice.logprobs) : [],
      finish: choice?.finish_reason,
      usage: chunk.usage,
      receipt: chunk.receipt,
    };
  }
  throw new ApiError('The connection ended before the answer was whole.');
}

function tokensOf(logprobs) {
  if (logprobs.content) {
    return logprobs.content.map(each => ({
      text: each.token,
      logProb: each.logprob,
      others: (each.top_logprobs ?? []).map(other => [other.token, other.logprob]),
    }));
  }
  return (logprobs.tokens ?? []).map((text, i) => ({
    text,
    logProb: logprobs.token_logprobs[i],
    others: Object.entries(logprobs.top_logprobs?.[i] ?? {}).sort((a, b) => b[1] - a[1]),
  }));
}
