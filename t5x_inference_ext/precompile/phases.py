"""The phases that precompile compiles: one table for flags, layouts and reports."""

import dataclasses

_DECODE_LAYOUTS = ('ws_2d/batch', 'ws_2d/heads', 'ws_1d/batch')
_PREFILL_LAYOUTS = ('ws_2d/batch', 'ws_2d/heads', 'wg_x/batch', 'wg_xy/batch', 'wg_xyz/batch')


@dataclasses.dataclass(frozen=True)
class CompilePhase:
  """A phase, as flags, the search for layouts and reports need it.

  Attributes:
    help: str. The phase in a few words, for `--help`.
    beside: str. The other phase's part, for reports: a format of prefill, decode and new_tokens.
    layouts: tuple of str. Layouts that are tried, in this order, where none is asked for
      (docs/layouts.md says which is for what).
    unit: str. Name of one pass, whose time is reported: a step, a chunk.
    one_token: bool. Each row takes one token a pass, so that there is no prompt length T.
    slot_refill: bool. Part of slot refill (engine.slots); the others belong to static batches.
    cache_decides: bool. Layouts differ in what the cache takes, not in temporaries: only a layout
      that holds less can make a program fit.
  """

  help: str
  beside: str
  layouts: tuple[str, ...]
  unit: str
  one_token: bool = False
  slot_refill: bool = False
  cache_decides: bool = False


COMPILE_PHASES = {
  'decode': CompilePhase(
    help='one token for each row',
    beside='weights shared with prefill in {prefill}',
    layouts=_DECODE_LAYOUTS,
    unit='step',
    one_token=True,
    cache_decides=True,
  ),
  'prefill': CompilePhase(
    help='whole prompts',
    beside='cache for decode in {decode}',
    layouts=_PREFILL_LAYOUTS,
    unit='prefill',
  ),
  'generate': CompilePhase(
    help='all that infer runs for a static batch, to be saved',
    beside='decode in {decode}, {new_tokens} new tokens',
    # How often its loop turns is known only when it runs, so that no estimate could choose.
    layouts=('ws_2d/batch',),
    unit='step',
  ),
  'extend': CompilePhase(
    help='the next chunk of prompts, on a cache of what came before',
    beside='a chunk, on a cache in the same',
    layouts=_PREFILL_LAYOUTS,
    unit='chunk',
    slot_refill=True,
  ),
  'slots': CompilePhase(
    help='a decode step of slot refill',
    beside='slot refill, prompts in {prefill}',
    layouts=_DECODE_LAYOUTS,
    unit='step',
    one_token=True,
    slot_refill=True,
    cache_decides=True,
  ),
  'admit': CompilePhase(
    help='the insertion of a prompt into a slot',
    beside='a prompt from {prefill} into its slot',
    layouts=('ws_2d/batch',),
    unit='prompt',
    slot_refill=True,
    cache_decides=True,
  ),
}
