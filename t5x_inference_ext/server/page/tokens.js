// The tokens of an answer as text on the page, each with its log-probability. Text of the model is
// only ever set as textContent.

const LEAST = [0.9, 0.7, 0.5, 0.25, 0.1, 0.02]; // probabilities from which on a colour is paler

const readout = document.getElementById('readout');
const spoken = document.getElementById('spoken');
const part = name => document.getElementById(`readout-${name}`);

/** Return a token in a form that shows its blanks. */
const shown = text => text.replaceAll(' ', '␣').replaceAll('\n', '↵').replaceAll('\t', '⇥') || '∅';

export function percent(logProb) {
  const value = 100 * Math.exp(logProb);
  if (value < 0.01) return 'under 0.01%';
  return `${value.toFixed(value < 1 || value > 99 ? 2 : 1)}%`;
}

/** Return a log-probability with a true minus sign. */
const signed = logProb => logProb.toFixed(3).replace('-', '−').replace(/^−0\.000$/, '0.000');

/** The text of one answer, as it comes.
 *
 * A delta may hold fewer or more tokens than come with it: text that could begin a stop text is
 * held back, and a character may be several tokens. Each span is then a run of tokens.
 */
export class TokenText {
  constructor(element) {
    this.element = element;
    this.text = '';
    this._tokens = [];
    this._left = '';
    this._spans = [];
    this._current = -1;
    element.tabIndex = 0;
    element.setAttribute('role', 'group');
    element.setAttribute('aria-label', 'Answer. The arrow keys step through its tokens.');
    element.addEventListener('keydown', event => this._key(event));
    element.addEventListener('blur', () => this._leave());
    element.addEventListener('pointerover', event => this._point(event.target));
    element.addEventListener('pointerleave', () => this._leave());
    element.addEventListener('click', event => this._point(event.target));
  }

  add(text, tokens) {
    this.text += text;
    this._left += text;
    this._tokens.push(...tokens);
    while (this._left && this._tokens.length) {
      const first = this._tokens[0].text;
      const fits = first && this._left.startsWith(first);
      const length = fits ? first.length : this._left.length;
      this._append(this._left.slice(0, length), this._tokens.splice(0, fits ? 1 : Infinity));
      this._left = this._left.slice(length);
    }
    if (this._left && !this._tokens.length) { // without log-probabilities
      this.element.append(this._left);
      this._left = '';
    }
  }

  _append(text, tokens) {
    const span = document.createElement('span');
    const logProb = tokens.reduce((sum, token) => sum + token.logProb, 0);
    const shade = LEAST.findIndex(least => Math.exp(logProb) >= least);
    span.className = `token p${shade < 0 ? LEAST.length : shade}`;
    span.textContent = text;
    this._spans.push({span, tokens, logProb});
    this.element.append(span);
  }

  _key(event) {
    const last = this._spans.length - 1;
    const to = {
      ArrowRight: Math.min(this._current + 1, last),
      ArrowLeft: this._current < 0 ? last : Math.max(this._current - 1, 0),
      Home: 0,
      End: last,
    }[event.key];
    if (event.key === 'Escape' && !readout.hidden) {
      this._leave();
      event.stopPropagation();
    }
    if (to === undefined || last < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this._show(to);
    const {tokens, logProb} = this._spans[to];
    const name = tokens.map(token => shown(token.text)).join(' ');
    spoken.textContent = `Token ${to + 1} of ${last + 1}: ${name}. Probability ` +
      `${percent(logProb)}, log-probability ${signed(logProb)}.`;
  }

  _point(target) {
    const index = this._spans.findIndex(each => each.span === target);
    if (index >= 0) this._show(index);
  }

  _leave() {
    this._spans[this._current]?.span.classList.remove('current');
    this._current = -1;
    readout.hidden = true;
  }

  _show(index) {
    this._spans[this._current]?.span.classList.remove('current');
    this._current = index;
    const {span, tokens, logProb} = this._spans[index];
    span.classList.add('current');
    span.scrollIntoView({block: 'nearest'});
    part('token').textContent = tokens.map(token => shown(token.text)).join(' ');
    part('probability').textContent = percent(logProb);
    part('details').textContent = `log-probability ${signed(logProb)}` +
      (tokens.length > 1 ? ` of ${tokens.length} tokens together` : '');
    const others = tokens.length > 1 ? [] : tokens[0].others;
    part('others').hidden = !others.length;
    part('others').tBodies[0].replaceChildren(...others.map(([text, other]) => {
      const row = document.createElement('tr');
      row.className = text === tokens[0].text ? 'chosen' : '';
      const name = document.createElement('code');
      name.textContent = shown(text);
      row.insertCell().append(name);
      row.insertCell().textContent = percent(other);
      return row;
    }));
    this._place(span);
  }

  /** Put the readout above the token, or below it where there is no room. */
  _place(span) {
    readout.hidden = false;
    const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const {offsetWidth: width, offsetHeight: height} = readout;
    const left = Math.min(Math.max(8, box.left), document.documentElement.clientWidth - width - 8);
    const top = box.top - height - 8;
    readout.style.left = `${left}px`;
    readout.style.top = `${top >= 8 ? top : box.bottom + 8}px`;
  }
}

for (const event of ['scroll', 'resize']) {
  addEventListener(event, () => { readout.hidden = true; }, {capture: true, passive: true});
}
