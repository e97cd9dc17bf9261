"""Table of the phases that precompile compiles, for flags, layout search and reports."""

import dataclasses

_DECODE_LAYOUTS = ('ws_2d/batch', 'ws_2d/heads', 'ws_1d/batch')
_PREFILL_LAYOUTS = ('ws_2d/batch', 'ws_2d/heads', 'wg_x/batch', 'wg_xy/batch', 'wg_xyz/batch')


@dataclasses.dataclass(frozen=True)
class CompilePhase:
  """A phase, with its properties for flags, layout search and reports.

  Attributes:
    help: str. A short description, for `--help`.
    beside: str. A format string in which reports describe the other phase, with fields prefill,
      decode and new_tokens.
    layouts: tuple of str. Layouts to try, in this order, if none is requested (docs/layouts.md says
      what each is good for).
    unit: str. Name of the pass whose time is reported, such as 'step' or 'chunk'.
    one_token: bool. Whether each row takes one token per pass, so that there is no prompt length T.
    slot_refill: bool. Whether the phase belongs to slot refill (engine.slots), not static batches.
    cache_decides: bool. Whether layouts differ in the cache's size, not in temporaries. Then only a
      layout with a smaller cache can make a program fit.
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
    help='the whole generation of a static batch, for infer to run',
    beside='decode in {decode}, {new_tokens} new tokens',
    # There is only one candidate: the number of loop turns is known only at run time, so estimates
    # could not compare layouts.
    layouts=('ws_2d/batch',),
    unit='step',
  ),
  'extend': CompilePhase(
    help='the next chunk of prompts, after a cache of the earlier ones',
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
  'verify': CompilePhase(
    help='the last token of each row and a draft of the next ones, with logits after all of them',
    beside='slot refill, prompts in {prefill}',
    layouts=_DECODE_LAYOUTS,
    unit='step',
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
