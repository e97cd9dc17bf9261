// What the engine does now: GET /status every second while the page is looked at.
//
// The server's answer, of which every field but `state` may be missing or null:
//
//   {"state": "ready" | "draining" | "dead", "model": TEXT, "version": TEXT, "uptime_seconds": N,
//    "slots": {"used": N, "total": N}, "waiting": N, "tokens_per_second": N,
//    "time_to_first_token_seconds": N, "prefixes": {"queries": N, "hits": N},
//    "pages": {"used": N, "total": N}, "mesh": "2x2x2", "layouts": {"prefill": TEXT,
//    "decode": TEXT}, "dtype": TEXT, "weights": TEXT, "cache": TEXT, "max_length": N,
//    "max_logprobs": N, "chat": BOOL}

import {readStatus} from './api.js';

const EVERY = 1000; // milliseconds between two looks; after an error, RARELY
const RARELY = 5000;
const KEPT = 120; // rates that the curve shows
const MOST_SQUARES = 64; // slots drawn one by one

const at = id => document.getElementById(id);
const put = (id, text) => {
  if (at(id).textContent !== text) at(id).textContent = text;
};
const rates = [];
const listeners = [];
let shownState = '';
let timer = 0;

/** Call a function with every status that comes. */
export const onStatus = listener => listeners.push(listener);

export function duration(seconds) {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  if (minutes < 48 * 60) return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  return `${Math.floor(minutes / 1440)} days`;
}

const known = (value, text) => (value === undefined || value === null ? '–' : text(value));
const number = value => value.toLocaleString('en', {maximumFractionDigits: value < 10 ? 1 : 0});
const share = ({used, total}) => `${number(used)} of ${number(total)}`;

function showState(state, text) {
  at('state').dataset.state = state;
  if (shownState !== text) put('state', text); // a live region: told when it changes
  shownState = text;
}

function showSlots(slots) {
  put('slots', known(slots, share));
  const total = slots && slots.total <= MOST_SQUARES ? slots.total : 0;
  while (at('squares').childElementCount > total) at('squares').lastChild.remove();
  while (at('squares').childElementCount < total) {
    at('squares').append(document.createElement('i'));
  }
  [...at('squares').children].forEach((square, i) => {
    square.classList.toggle('used', i < slots.used);
  });
}

function showRate(rate) {
  rates.push(rate ?? 0);
  if (rates.length > KEPT) rates.shift();
  put('rate', number(rate ?? 0));
  const top = Math.max(1, ...rates);
  const from = KEPT - rates.length;
  const line = rates.map((each, i) => `${from + i} ${(29 - 27 * each / top).toFixed(1)}`).join('L');
  at('spark-line').setAttribute('d', `M${line}`);
  at('spark-area').setAttribute('d', `M${from} 30L${line}L${KEPT - 1} 30Z`);
}

function show(status) {
  const texts = {ready: 'ready', draining: 'shutting down', dead: 'the engine has stopped'};
  showState(status.state, texts[status.state] ?? String(status.state));
  put('model', status.model ?? 'Model');
  put('version', status.version ?? '');
  document.title = status.model ? `${status.model} · t5x_inference_ext` : 't5x_inference_ext';
  showRate(status.tokens_per_second);
  showSlots(status.slots);
  put('waiting', known(status.waiting, number));
  put('first-token', known(status.time_to_first_token_seconds, duration));
  put('prefixes', known(status.prefixes, ({queries, hits}) => queries
    ? `${number(hits)} of ${number(queries)} (${Math.round(100 * hits / queries)}%)`
    : 'no prompt yet'));
  put('pages', known(status.pages, share));
  at('pages-bar').hidden = !status.pages;
  at('pages-bar').value = status.pages ? status.pages.used / status.pages.total : 0;
  put('mesh', known(status.mesh, String));
  put('prefill-layout', known(status.layouts?.prefill, String));
  put('decode-layout', known(status.layouts?.decode, String));
  put('weights', [status.weights, status.dtype && `computed in ${status.dtype}`]
    .filter(Boolean).join(', ') || '–');
  put('cache', known(status.cache, String));
  put('uptime', known(status.uptime_seconds, duration));
  listeners.forEach(listener => listener(status));
}

async function look() {
  clearTimeout(timer);
  let next = EVERY;
  try {
    show(await readStatus());
    at('gauges').hidden = false;
    at('engine-note').hidden = true;
  } catch (error) {
    next = RARELY;
    showState('unknown', 'no answer');
    put('engine-note', error.message);
    at('engine-note').hidden = false;
    at('gauges').hidden = true;
  }
  if (!document.hidden) timer = setTimeout(look, next);
}

/** Begin to look, and look again at once. */
export const lookNow = look;

document.addEventListener('visibilitychange', () => {
  if (!document.hidden) look();
});
