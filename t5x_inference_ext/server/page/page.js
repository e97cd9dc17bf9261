// The page of the server: prompts out, answers in, with sampling options and the engine beside it.

import {answer, ApiError, getKey, setKey} from './api.js';
import {duration, lookNow, onStatus} from './engine.js';
import {TokenText} from './tokens.js';

const MOST_SPOKEN = 1000; // characters of an answer that a screen reader is told at once
const OTHERS = 5; // most likely tokens to ask for at each token, if the server gives so many

const MODES = {
  chat: {
    path: 'v1/chat/completions',
    label: 'Message',
    button: 'Send',
    keys: 'Enter sends, Shift+Enter begins a line.',
    invitation: 'Ask the model something.',
    examples: ['What is the capital of France?', 'Explain a KV cache in two sentences.'],
  },
  completion: {
    path: 'v1/completions',
    label: 'Text to continue',
    button: 'Continue',
    keys: 'Ctrl+Enter continues.',
    invitation: 'Give the model a beginning.',
    examples: ['def main(', 'Once upon a time'],
  },
};

const FINISHES = {
  length: 'cut at the most tokens',
  content_filter: 'filtered',
  tool_calls: 'calls a tool',
};

const at = id => document.getElementById(id);
const element = (kind, name, text = '') => {
  const made = document.createElement(kind);
  made.className = name;
  made.textContent = text;
  return made;
};
const button = (text, action) => {
  const made = element('button', '', text);
  made.type = 'button';
  made.addEventListener('click', action);
  return made;
};
const numbered = new Intl.NumberFormat('en');

let mode = 'chat';
let messages = []; // of the chat, as the API takes them
let running = null; // AbortController of the answer that comes
let most = 0; // likely tokens that the server gives

function say(text) {
  at('spoken').textContent = text;
}

/** Return the sampling options that are not left to the server. */
function sampling() {
  const value = id => at(id).value.trim();
  const options = {
    temperature: Number(value('temperature') || 0),
    top_p: Number(value('top-p') || 1),
    top_k: Number(value('top-k') || 0),
    max_tokens: Number(value('max-tokens') || 256),
  };
  if (value('seed')) options.seed = Number(value('seed'));
  const stops = at('stop-texts').value.split('\n').filter(Boolean);
  if (stops.length) options.stop = stops;
  if (at('receipt').checked) options.receipt = true;
  return options;
}

function requestBody(asked, text) {
  const others = Math.min(OTHERS, most);
  if (asked === 'completion') return {...sampling(), prompt: text, logprobs: others};
  const system = at('system').value.trim();
  return {
    ...sampling(),
    messages: [
      ...(system ? [{role: 'system', content: system}] : []),
      ...messages,
      {role: 'user', content: text},
    ],
    logprobs: true,
    ...(others ? {top_logprobs: others} : {}),
  };
}

/** The asked and the answered of one request, on the page. */
function makeTurn(asked, text) {
  const turn = element('article', `turn ${asked}`);
  const box = element('div', 'answer');
  if (asked === 'chat') turn.append(element('p', 'asked', text));
  else box.append(element('span', 'given', text));
  turn.append(box);
  at('empty').hidden = true;
  at('log').append(turn);
  turn.scrollIntoView({block: 'end'});
  return {turn, box, tokens: new TokenText(box), foot: element('p', 'foot')};
}

function follow() {
  const log = at('log');
  const scroller = log.scrollHeight > log.clientHeight ? log : document.documentElement;
  const left = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  return () => {
    if (left < 80) scroller.scrollTop = scroller.scrollHeight;
  };
}

function showFailure(turn, error, again) {
  const failed = element('div', 'failed');
  failed.setAttribute('role', 'alert');
  const known = error instanceof ApiError;
  failed.append(element('p', '', known ? error.message : `The page failed: ${error.message}`));
  if (known && error.detail) failed.append(element('p', 'hint', error.detail));
  failed.append(button('Try again', again));
  turn.append(failed);
}

function offerReceipt(foot, receipt) {
  foot.append(button('Receipt', () => {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([JSON.stringify(receipt, null, 2)]));
    link.download = 'receipt.json';
    link.click();
    URL.revokeObjectURL(link.href);
  }));
}

async function ask(asked, text) {
  const {turn, box, tokens, foot} = makeTurn(asked, text);
  const conversation = messages;
  const begun = performance.now();
  let first = 0;
  let count = 0;
  let finish = null;
  let usage = null;
  let receipt = null;
  setRunning(new AbortController());
  box.classList.add('running');
  turn.setAttribute('aria-busy', 'true');
  say('The answer begins.');
  try {
    for await (const part of answer(MODES[asked].path, requestBody(asked, text), running.signal)) {
      if (!first && (part.text || part.tokens.length)) first = performance.now();
      count += part.tokens.length;
      finish = part.finish ?? finish;
      usage = part.usage ?? usage;
      receipt = part.receipt ?? receipt;
      const keep = follow();
      tokens.add(part.text, part.tokens);
      keep();
    }
  } catch (error) {
    if (error.name !== 'AbortError') {
      box.hidden = asked === 'chat' && !tokens.text;
      showFailure(turn, error, () => {
        turn.remove();
        ask(asked, text);
      });
      return;
    }
    finish = 'stopped by you';
  } finally {
    const keep = follow();
    setRunning(null);
    box.classList.remove('running');
    turn.removeAttribute('aria-busy');
    at('clear').disabled = false;
    keep();
  }
  if (asked === 'chat' && tokens.text) {
    conversation.push({role: 'user', content: text}, {role: 'assistant', content: tokens.text});
  }
  const made = usage?.completion_tokens ?? count;
  const seconds = (performance.now() - first) / 1000;
  const facts = [`${numbered.format(made)} ${made === 1 ? 'token' : 'tokens'}`];
  if (first) facts.push(`first after ${duration((first - begun) / 1000)}`);
  if (made > 1 && seconds > 0) facts.push(`${((made - 1) / seconds).toFixed(1)} tokens/s`);
  if (finish !== 'stop' && finish) facts.push(FINISHES[finish] ?? finish);
  foot.append(...facts.map(fact => element('span', '', fact)));
  if (navigator.clipboard) { // browsers have it for https and this machine alone
    foot.append(button('Copy', () => navigator.clipboard.writeText(tokens.text)));
  }
  if (receipt) offerReceipt(foot, receipt);
  const keep = follow();
  turn.append(foot);
  keep();
  say(`${tokens.text.slice(0, MOST_SPOKEN)}\n${facts.join(', ')}.`);
}

function setRunning(controller) {
  running = controller;
  const stopFocused = document.activeElement === at('stop');
  at('stop').hidden = !running;
  at('send').hidden = Boolean(running);
  if (!running && stopFocused) at('prompt').focus();
}

function submit() {
  const text = at('prompt').value;
  if (running || (mode === 'chat' && !text.trim())) return;
  if (!at('sampling').checkValidity()) {
    at('options').open = true;
    at('sampling').reportValidity();
    return;
  }
  at('prompt').value = '';
  ask(mode, text);
}

function setMode(name) {
  mode = name;
  const words = MODES[mode];
  document.querySelector(`[name=mode][value=${mode}]`).checked = true;
  at('composer').classList.toggle('composing-completion', mode === 'completion');
  document.querySelectorAll('.chat-only').forEach(each => { each.hidden = mode !== 'chat'; });
  at('prompt-label').textContent = words.label;
  at('send').textContent = words.button;
  at('keys').textContent = words.keys;
  at('invitation').textContent = words.invitation;
  at('examples').replaceChildren(...words.examples.map(text => button(text, () => {
    at('prompt').value = text;
    at('prompt').focus();
  })));
}

function clear() {
  running?.abort();
  messages = [];
  at('log').querySelectorAll('.turn').forEach(turn => turn.remove());
  at('empty').hidden = false;
  at('clear').disabled = true;
  at('prompt').focus();
}

document.querySelectorAll('[name=mode]').forEach(radio => {
  radio.addEventListener('change', () => setMode(radio.value));
});
at('clear').addEventListener('click', clear);
at('stop').addEventListener('click', () => running?.abort());
at('composer').addEventListener('submit', event => {
  event.preventDefault();
  submit();
});
at('prompt').addEventListener('keydown', event => {
  if (event.key !== 'Enter' || event.isComposing) return;
  if (mode === 'chat' ? !event.shiftKey : event.ctrlKey || event.metaKey) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener('keydown', event => {
  if (event.key === 'Escape') running?.abort();
});
for (const id of ['sampling', 'connection-form']) {
  at(id).addEventListener('submit', event => event.preventDefault());
}
at('coloured').addEventListener('change', event => {
  at('log').classList.toggle('plain', !event.target.checked);
  at('legend').classList.toggle('off', !event.target.checked);
});
at('key').value = getKey();
at('key').addEventListener('change', event => {
  setKey(event.target.value);
  lookNow();
});

let knowsChat = false;
onStatus(status => {
  most = status.max_logprobs ?? 0;
  if (status.chat === false && !knowsChat) { // the checkpoint has no chat template
    document.querySelector('[name=mode][value=chat]').disabled = true;
    setMode('completion');
  }
  knowsChat = true;
});

setMode('chat');
lookNow();
// A phone shows the page before its keyboard, and what can be set is a tap away.
if (matchMedia('(max-width: 56rem)').matches) at('options').open = false;
else at('prompt').focus();
