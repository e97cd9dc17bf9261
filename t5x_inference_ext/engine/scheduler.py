"""Continuous batching: finished rows leave their slots, waiting prompts enter them.

    scheduler = Scheduler(model, weights, config)
    handle = scheduler.submit(Request(tokens))  # from any thread, at any time
    while not scheduler.idle:
      for event in scheduler.step():
        ...

One `step` takes new submissions and cancellations, prefills waiting prompts, inserts them into free
slots, starts a decode step, and returns the tokens of the previous step. docs/life_of_a_request.md
follows one request through the scheduler.
"""

import collections
import warnings

from t5x_inference_ext.engine.adapters import NO_ADAPTERS, AdapterNames
from t5x_inference_ext.engine.admission import CheckedRequest, admitted
from t5x_inference_ext.engine.books import wrong_books
from t5x_inference_ext.engine.decoder import Decoder
from t5x_inference_ext.engine.executor import DeviceExecutor, Executor
from t5x_inference_ext.engine.grammars import Grammars
from t5x_inference_ext.engine.inbox import Inbox
from t5x_inference_ext.engine.open_requests import OpenRequests
from t5x_inference_ext.engine.prefilling import Prefiller, Prompt
from t5x_inference_ext.engine.prefix_cache import PrefixCache
from t5x_inference_ext.engine.request import Event, Handle, Request, RequestState
from t5x_inference_ext.engine.rows import Row, rows_of
from t5x_inference_ext.engine.scheduler_config import SchedulerConfig
from t5x_inference_ext.engine.slot_table import SlotTable
from t5x_inference_ext.engine.stats import PrefixStats, SchedulerStats
from t5x_inference_ext.engine.warm_up import CompiledProgram
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.model.weights import Weights
from t5x_inference_ext.text.vocabulary import Vocabulary


class Scheduler:
  """Serves requests in the slots of a model. Used for files, tasks, the server and Engine.stream.

  A row gets the tokens that it would get alone: neither the sampling noise nor attention depends on
  the other rows. `submit` and `cancel` may be called from any thread; one thread at a time calls
  `step`.

  Args:
    model: Decides mesh and layouts.
    weights: Weights on that mesh; None with an executor that has its own, or needs none.
    config: Sizes that the programs are compiled for.
    vocabulary: Needed by requests for text, with stop texts or with a grammar.
    inbox: Queue of incoming requests; None: a new one, of this process alone.
    executor: Runs the programs; None: a DeviceExecutor, on the devices of the mesh.
    adapters: Names of the adapters beside the weights.
  """

  def __init__(
    self,
    model: Model,
    weights: Weights | None,
    config: SchedulerConfig,
    *,
    vocabulary: Vocabulary | None = None,
    inbox: Inbox | None = None,
    executor: Executor | None = None,
    adapters: AdapterNames = NO_ADAPTERS,
  ) -> None:
    self.model, self.config, self.adapters = model, config, adapters
    self._vocabulary, self._inbox = vocabulary, inbox or Inbox()
    if executor is None:
      assert weights is not None
      executor = DeviceExecutor(model, weights, config)
    self.executor = executor
    self._prefixes = PrefixCache(executor, config) if executor.blocks else None
    self._prefiller = Prefiller(executor, config, self._prefixes)
    self._grammars = Grammars(vocabulary, model.config.vocab_size)
    grammars = self._grammars.available
    self._decoder = Decoder(executor, config, model.config.vocab_size, grammars=grammars)
    self._table = SlotTable(config, executor.shards)
    self._waiting: collections.deque[Prompt] = collections.deque()
    self._open, self._preempted = OpenRequests(), 0

  @property
  def stats(self) -> SchedulerStats:
    """Counters of the work done so far."""
    return SchedulerStats(
      self._prefiller.positions,
      self._prefiller.tokens,
      self._decoder.decoded,
      self._decoder.generated,
      self._preempted,
      self._prefixes.stats if self._prefixes is not None else PrefixStats(),
      self._decoder.drafts,
    )

  @property
  def rows(self) -> tuple[Row | None, ...]:
    """The row in each slot, or None."""
    return tuple(self._table.rows)

  @property
  def idle(self) -> bool:
    """Whether no request is waiting, being prefilled or being decoded."""
    return self._inbox.empty and not self._open and not self._decoder.under_way

  @property
  def wanted(self) -> int:
    """How many more requests the next step could start."""
    room = self._table.free + self.config.prefill_rows
    return max(0, room - len(self._waiting) - self._inbox.submissions)

  @property
  def pages(self) -> tuple[int, int]:
    """Number of the cache's own (not shared) pages in use, and their total."""
    return self._table.pool.held, self._table.pool.total

  def submit(self, request: Request | CheckedRequest) -> Handle:
    """Queue a request; return its handle. Any thread may call this, also during a step.

    A plain Request is checked first, with the errors of `check`; a CheckedRequest is not.
    """
    checked = request if isinstance(request, CheckedRequest) else self.check(request)
    return self._inbox.submit(*checked)

  def check(self, request: Request) -> CheckedRequest:
    """Check a request and make its matchers; `submit` then returns at once. Any thread may call it.

    Compiling a grammar may take up to text.grammar_check.GRAMMAR_SECONDS.

    Raises:
      UserError: The request does not fit, its grammar can't be used, or [structured] is missing.
    """
    request = self.adapters.prompted(request)
    request = admitted(request, self.config, self._table, self.model.config, self._vocabulary)
    return CheckedRequest(request, self._grammars.matchers(request.grammar, len(request.seeds)))

  def cancel(self, handle: Handle) -> None:
    """End a request within the next step, unless it has ended. Any thread may call this."""
    self._inbox.cancel(handle.index)

  def warm_up(self) -> list[CompiledProgram]:
    """Compile every program that a request can need; return them. The scheduler must be idle."""
    done: list[CompiledProgram] = []
    self._prefiller.warm_up(done)
    self._decoder.warm_up(self._table, done)
    self._grammars.warm_up()
    return done

  def step(self) -> list[Event]:
    """Take commands, prefill, insert rows, start decoding; return new tokens and ends of rows.

    A step prefills at most `prefill_budget` positions, but at least one chunk. Then one decode step
    follows, or `decode_steps` if no request waits and no row has a grammar.
    """
    events = self._take_commands()
    after = self._fill_slots()
    leave = int(self.config.decode_steps == 1)
    if self._make_room(events):
      if any(row is not None and row.matcher is not None for row in self._table.rows):
        begun = self._decoder.begin_masked(self._table, self._rows_wait)
        self._read(events, leave=0)  # the masks need these tokens; meanwhile the devices work
        self._decoder.choose_masked(self._table, begun, after)
        leave = 1
      else:
        steps = 1 if self._rows_wait and self._table.free else self.config.decode_steps
        self._decoder.decode(self._table, steps, self._rows_wait, after)
    # With single steps, the devices run the newest step while the host reads the previous one.
    going = any(row is not None and row.least < row.limit for row in self._table.rows)
    self._read(events, leave=leave if going else 0)
    self._free_full_slots()
    if events and self.idle:
      for wrong in self.check_books():
        warnings.warn(f'the books of the scheduler do not add up: {wrong}', stacklevel=2)
    return events

  def check_books(self) -> list[str]:
    """Return one sentence for each inconsistency in an idle scheduler's records; [] if none."""
    return wrong_books(
      self._table,
      self._prefixes.tree if self._prefixes is not None else None,
      rows_wait=self.idle and self._rows_wait,
      rows_decode=self.idle and self._table.busy,
      requests=(self._inbox.submitted, self._open.finished, len(self._open)),
      queued=self._inbox.submissions,
    )

  def _take_commands(self) -> list[Event]:
    """Process submissions and cancellations; return the final events of cancelled rows."""
    events = []
    for command, handle in self._inbox.take():
      if (request := command.request) is not None:
        assert handle is not None
        if request.grammar and not handle.matchers:  # another process checked it
          handle.matchers = self._grammars.compiled(request.grammar, len(request.seeds))
        rows = rows_of(handle, self.config.end_ids, self._vocabulary, self.adapters)
        self._open.add(rows)
        self._waiting.append(Prompt(request.tokens, rows))
      else:
        for row in self._open.unfinished_rows(command.number):
          row.end('cancelled')
          events.append(Event(command.number, row.sample, [], [], [], 'cancelled'))
          self._open.close(row)
    if events:
      self._prefiller.drop()
      self._waiting = collections.deque(p for p in self._waiting if not p.finished)
      self._table.leave_all(lambda row: row.finished)
    return events

  def _fill_slots(self) -> str | None:
    """Prefill prompts within the budget, fill slots; return the last program (Decoder.decode)."""
    budget, last = self.config.prefill_budget, None
    while self._table.free and self._rows_wait:
      self.executor.settle()
      if self._prefiller.ready:
        if not self._insert_next():
          break
        last = 'insert'
      elif budget <= 0 or not self._has_group():
        break
      else:
        budget, last = budget - self._prefiller.chunk(), 'prefill'
    if last and self._table.busy:
      self.executor.settle()
    elif last:  # chunks of prompts that are cancelled must not queue up
      self.executor.wait()
    return last

  @property
  def _rows_wait(self) -> bool:
    return bool(self._waiting or self._prefiller.ready or self._prefiller.active)

  def _has_group(self) -> bool:
    """Start a group of waiting prompts if none is active; return whether one is active now."""
    if not self._prefiller.active and self._waiting:
      count = min(self.config.prefill_rows, len(self._waiting))
      group = [self._waiting.popleft() for _ in range(count)]
      for prompt in group:
        prompt.rows[0].handle.state = RequestState.PREFILLING
      self._prefiller.begin(group)
    return self._prefiller.active

  def _insert_next(self) -> bool:
    """Insert the next row that is ready; return False if there are too few pages for it."""
    ready = self._prefiller.ready[0]
    row, path, length = ready.row, ready.prompt.path, len(ready.prompt.tokens)
    if not row.finished:
      slot = self._table.find_slot(length + 1)
      if slot is None:
        return False
      unwritten = self._table.enter(slot, row, length + 1, self._table.page_names(path))
      self._decoder.insert(ready, slot, self._table, unwritten)
      row.handle.state = RequestState.DECODING
    self._prefiller.ready.popleft()
    return True

  def _make_room(self, events: list[Event]) -> bool:
    """Allocate the next steps' pages, preempting the youngest rows; return whether rows decode."""
    self._free_full_slots()
    while self._table.busy:
      slot = self._table.grow(self.config.most_tokens)
      if slot is None:
        return True
      if self._decoder.under_way:  # rows that have ended may free pages
        self._read(events, leave=0)
      else:
        self._preempt(slot)
    return False

  def _preempt(self, slot: int) -> None:
    """Move a row out of its slot to the front of the queue; it will be prefilled again."""
    row = self._table.row_in(slot)
    self._table.leave(slot)
    row.handle.state = RequestState.WAITING
    self._preempted += 1
    self._waiting.appendleft(Prompt((*row.handle.request.tokens, *row.tokens), [row]))

  def _free_full_slots(self) -> None:
    """Free the slots of rows whose last token a started program will produce."""
    if self.config.decode_steps == 1:
      for slot, row in enumerate(self._table.rows):
        if row is not None and row.least >= row.limit:
          self._leave(slot)

  def _leave(self, slot: int) -> None:
    """Free a slot; before that, save the row's reply if its request asks for it."""
    row = self._table.row_in(slot)
    if row.handle.request.cache_reply and self._prefixes is not None:
      self._prefixes.save_reply(row, slot, self._table.pool)
    self._table.leave(slot)

  def _read(self, events: list[Event], leave: int) -> None:
    """Read the new tokens of all running programs except the last `leave`; append their events."""
    for new in self._decoder.read(leave=leave):
      row = new.row
      if row.finished:  # cancelled, or ended by a stop that only the host looks for
        continue
      if new.tokens or new.failed:
        events.append(row.add(new.tokens, new.log_probs, new.top, new.failed))
      if row.finished:
        if self._table.rows[new.slot] is row:
          self._leave(new.slot)
        self._open.close(row)
