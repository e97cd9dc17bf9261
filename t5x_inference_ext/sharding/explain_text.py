"""What explain.describe found, for people: tables in the paper's notation, a subscript naming the axes of a split."""

from collections.abc import Iterable, Mapping, Sequence
import re
import textwrap

from jax.sharding import Mesh

from t5x_inference_ext.sharding.explain import (
  ExplainedBlock,
  ExplainedTensor,
  ExplainSetting,
  Explanation,
  Phase,
  explain_setting,
)
from t5x_inference_ext.sharding.layout import ORDER, Axes, Layout, num_shards, shape_text
from t5x_inference_ext.sharding.mesh import mesh_links
from t5x_inference_ext.sharding.torus import BROKEN, RING

_PARTS = {'attention_output': 'attention', 'mlp_output': 'mlp', 'embedding': 'vocab'}


def explain(setting: ExplainSetting, mesh: Mesh | None = None) -> str:
  """The text for a setting; with a mesh of devices it also says what they are and how they are linked.

  Raises:
    MeshError: see explain.describe.
  """
  return render(explain_setting(setting), mesh)


def render(e: Explanation, mesh: Mesh | None = None) -> str:
  """Tables of weights and of both phases, what they come to, and what to know about them."""
  s = e.setting
  lines = [*_heading(e, mesh), '', *_table(e.weights, s)]
  for name, blocks in e.blocks.items():
    if len(blocks) > 1 or blocks[0].padding:
      lines.append(f'  {name}, each device: [{" | ".join(map(_block, blocks))}]')
  for phase in e.phases:
    lines += [
      '',
      _phase_title(phase, s),
      *_table(phase.tensors, s),
      *_wrap(f'  {_attention(phase, s)}'),
      *_wrap(f'  {_moves(phase)}'),
    ]
  lines += ['', _total(e)]
  for remark in _remarks(e, mesh):
    lines += _wrap(f'* {remark}')
  return '\n'.join(lines) + '\n'


def weights_notation(layout: Layout) -> str:
  """How weights are stored, as the paper writes it: E_xF_zy."""
  return f'{_split("E", layout.stored_embed)}{_split("F", layout.stored_hidden)}'


def sharding_text(tensor: ExplainedTensor, mesh: Mapping[str, int]) -> str:
  """'L E_x columns_zy'; axes of size 1, which split nothing, are left out."""
  spec = (*tensor.spec, *(None,) * (len(tensor.dims) - len(tensor.spec)))
  return ' '.join(_split(dim, _axes(entry, mesh)) for dim, entry in zip(tensor.dims, spec))


def bytes_text(count: int) -> str:
  """1536 -> '1.50 KiB'."""
  if count < 1024:
    return f'{count} B'
  for unit in ('KiB', 'MiB', 'GiB'):
    count /= 1024
    if count < 1024 or unit == 'GiB':
      return f'{count:.2f} {unit}'


_HEADER = ('tensor', 'shape', 'dtype', 'sharding', 'per device', 'logical axes')


def _table(tensors: Sequence[ExplainedTensor], s: ExplainSetting) -> Iterable[str]:
  rows = [_HEADER]
  for t in tensors:
    shape = (f'{t.arrays} of ' if t.arrays > 1 else '') + 'x'.join(map(str, t.shape))
    rows.append(
      (t.name, shape, t.dtype, sharding_text(t, s.mesh), bytes_text(t.bytes), ', '.join(t.axes))
    )
  widths = [max(map(len, column)) for column in zip(*rows)]
  for *cells, count, axes in rows:
    left = '  '.join(cell.ljust(width) for cell, width in zip(cells, widths))
    yield f'  {left}  {count.rjust(widths[-2])}  {axes}'


def _wrap(text: str) -> list[str]:
  # No line ends between a number and its unit.
  text = re.sub(r' (?=([KMG]i)?B\b)', '\xa0', text)
  lines = textwrap.wrap(text, 120, subsequent_indent='    ', break_on_hyphens=False)
  return [line.replace('\xa0', ' ') for line in lines]


def _heading(e: Explanation, mesh: Mesh | None) -> Iterable[str]:
  s = e.setting
  devices, links = '', ''
  if mesh is not None:
    devices = f' ({mesh.devices.flat[0].device_kind})'
    found = mesh_links(mesh)
    links = '; links: ' + (
      ', '.join(f'{a} {link}' for a, link in found.items()) if found else 'no torus known'
    )
  yield from _wrap(f'model: {s.config}')
  yield f'mesh:  {shape_text(s.mesh)}, {num_shards(tuple(s.mesh), s.mesh)} devices{devices}{links}'
  rounded = f' ({s.batch} rounded up to what the mesh takes)' if s.rows != s.batch else ''
  yield from _wrap(
    f'pass:  B {s.rows}{rounded}, T {s.prompt_length} in prefill and 1 in decode, S {s.cache_length}; '
    f'{"int8" if s.int8 else s.dtype} weights, {s.dtype} activations, {s.cache or s.dtype} cache'
  )


def _phase_title(phase: Phase, s: ExplainSetting) -> str:
  layout, p = phase.sharding.layout, phase.sharding
  if layout.gathered_axes:
    gathered = f'{_split("E", layout.embed_axes)}{_split("F", layout.hidden_axes)}'
    weights = f'weights {weights_notation(layout)} gathered over {"".join(layout.gathered_axes)} to {gathered}'
  else:
    weights = f'weights {weights_notation(layout)} stay'
  stream = ''.join(map(_split, 'BTE', p.residual))
  rings = ('', ', looped one way', ', looped both ways')[layout.ring_directions]
  return f'{phase.name}: {layout} ({weights}, activations {stream}{rings})'


def _attention(phase: Phase, s: ExplainSetting) -> str:
  """What a device attends with."""
  p = phase.sharding

  def share(what, count, axes):
    axes = tuple(a for a in axes if s.mesh[a] > 1)
    return f'{count // num_shards(axes, s.mesh)} of {count} {what}' + (
      f' ({"".join(axes)})' if axes else ''
    )

  heads = p.heads.heads * num_shards(p.attention_heads, s.mesh)
  padding = heads - s.config.num_heads
  text = [
    share('rows', s.rows, p.attention_rows),
    share('query heads', heads, p.attention_heads)
    + (f', {padding} of them padding' if padding else ''),
  ]
  if phase.length > 1:
    text.append(share('positions', phase.length, p.attention_positions))
  kv = f'{p.heads.kv_heads} key head{"s" if p.heads.kv_heads > 1 else ""}'
  return f'attention, each device: {"; ".join(text)}; {kv}'


def _moves(phase: Phase) -> str:
  """What a device sends in one layer, collective by collective."""
  items = [
    f'{m.name} {m.kind.replace("_", "-")}({"".join(m.axes)}) {bytes_text(round(m.moved))}'
    for m in phase.moves
  ]
  total = bytes_text(round(sum(m.moved for m in phase.moves)))
  return f'a layer sends {total} from each device' + (f': {"; ".join(items)}' if items else '')


def _total(e: Explanation) -> str:
  text = (
    f'each device: weights {bytes_text(e.weight_bytes)} + cache {bytes_text(e.cache_bytes)} = '
    f'{bytes_text(e.weight_bytes + e.cache_bytes)}'
  )
  made = sum(
    t.bytes for t in e.phases[0].tensors if t.name in ('keys, values', 'keys, values scales')
  )
  return text + (
    f'; in prefill {bytes_text(e.weight_bytes + made)} with its keys and values'
    if made > e.cache_bytes
    else ''
  )


def _block(b: ExplainedBlock) -> str:
  text = f'{", ".join(_PARTS.get(n, n) for n in b.names)} {b.width * b.unit}'
  what = 'head' if b.unit > 1 else ''
  if what:
    text += f' ({b.width} head{"s" if b.width > 1 else ""})'
  notes = [
    f'{count} {kind}' for count, kind in ((b.padding, 'padding'), (b.copies, 'copies')) if count
  ]
  return text + (f' of {b.total}{" heads" if what else ""}, {" and ".join(notes)}' if notes else '')


def _remarks(e: Explanation, mesh: Mesh | None) -> Iterable[str]:
  s = e.setting
  prefill, decode = e.phases
  for phase in e.phases:
    p = phase.sharding
    if phase.repeated:
      axes, count = ''.join(phase.repeated), num_shards(phase.repeated, s.mesh)
      yield (
        f'{phase.name}: attention splits neither rows nor heads nor positions over {axes}; all {count} devices '
        'along it do the same'
      )
    keys = tuple(
      a for a in ORDER if s.mesh[a] > 1 and a in p.attention_heads + p.attention_positions
    )
    if p.heads.multiquery and keys:
      yield f'{phase.name}: the one key head is whole on all {num_shards(keys, s.mesh)} devices along {"".join(keys)}'
    if phase.gathered and p.layout.ring_directions:
      yield f'{phase.name}: gathered weights travel shard by shard; no whole matrix is held'
    elif phase.gathered:
      yield (
        f'{phase.name}: weights are gathered matrix by matrix, the largest {bytes_text(phase.gathered)} on each '
        'device; one is in use and one in flight'
      )
  if prefill.length != s.prompt_length:
    yield f'prefill: {s.prompt_length} positions are padded to {prefill.length}, which divide over the mesh'
  made, cache = _tensor(prefill, 'keys, values'), _tensor(decode, 'cache')
  change = ' to '.join(sharding_text(t, s.mesh).removeprefix('L ') for t in (made, cache))
  if e.moved:
    yield f'after prefill keys and values move once, {change}: {bytes_text(e.moved)} to a device'
  elif made.bytes * s.cache_length > cache.bytes * prefill.length:
    yield f'after prefill each device keeps its part of keys and values, {change}: nothing moves'
  else:
    yield 'after prefill keys and values stay where they are'
  for axis, link in ((mesh is not None and mesh_links(mesh)) or {}).items():
    if link == BROKEN:
      yield f'some neighbours along {axis} are more than one link apart: another mesh shape may be faster'
    elif link != RING and any(p.sharding.layout.ring_directions for p in e.phases):
      yield (
        f'{axis} is a chain, not a ring: what looped collectives send from its last device to its first crosses '
        'all of it'
      )


def _tensor(phase: Phase, name: str) -> ExplainedTensor:
  return next(t for t in phase.tensors if t.name == name)


def _axes(entry, mesh: Mapping[str, int]) -> Axes:
  axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
  return tuple(a for a in axes if mesh[a] > 1)


def _split(letter: str, axes: Axes) -> str:
  return f'{letter}_{"".join(axes)}' if axes else letter
