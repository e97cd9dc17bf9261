"""The text of `--explain_layout`: tables in the paper's notation."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import re
import textwrap

from jax.sharding import Mesh

from t5x_inference_ext.quantization.formats import weight_format
from t5x_inference_ext.sharding.columns import PackedPart
from t5x_inference_ext.sharding.explain import (
  ExplainedPhase,
  ExplainedTensor,
  ExplainSetting,
  Explanation,
  explain_setting,
)
from t5x_inference_ext.sharding.layout import Axes, Layout, num_shards, shape_text
from t5x_inference_ext.sharding.mesh import AXES, mesh_links
from t5x_inference_ext.sharding.torus import BROKEN
from t5x_inference_ext.text_format import binary_bytes

# Logical axis -> the letter of the dimension (config.py).
_LETTERS = {
  'layers': 'L',
  'vocab': 'V',
  'whole_vocab': 'V',
  'embed': 'E',
  'features': 'E',
  'residual': 'E',
  'mlp': 'F',
  'residual_rows': 'B',
  'rows': 'B',
  'attention_rows': 'B',
  'sampled_rows': 'B',
  'residual_positions': 'T',
  'positions': 'T',
  'attention_positions': 'T',
  'cache_positions': 'S',
  'attention_heads': 'H',
  'kv_heads': 'K',
  'd_head': 'Q',
}
_PARTS = {
  'attention_output': 'attention',
  'mlp_output': 'mlp',
  'embedding': 'vocab',
  'head': 'vocab',
  'position_embedding': 'positions',
}
_HEADER = ('tensor', 'shape', 'dtype', 'sharding', 'per device', 'logical axes')


def explain(setting: ExplainSetting, mesh: Mesh | None = None) -> str:
  """Return the text for a run. With a mesh of devices it includes their kind and their links.

  Raises:
    MeshError: The mesh does not divide the model, or the two layouts can't share weights.
  """
  e = explain_setting(setting)
  lines = [*_heading(setting, mesh), '', *_table(e.weights, setting)]
  for name, parts in e.blocks.items():
    if len(parts) > 1 or parts[0].padding:
      lines.append(f'  {name}, each device: [{" | ".join(map(_part, parts))}]')
  for phase in e.phases:
    lines += ['', _phase_title(phase), *_table(phase.tensors, setting)]
    lines += _wrap(f'  {_attention(phase, setting)}') + _wrap(f'  {_collectives(phase)}')
  weights, cache = e.weight_bytes, e.cache_bytes
  held = f'weights {binary_bytes(weights)} + cache {binary_bytes(cache)}'
  lines += ['', f'each device: {held} = {binary_bytes(weights + cache)}']
  made = sum(t.bytes for t in e.phases[0].tensors if t.name.startswith('keys, values'))
  if made > cache:
    lines[-1] += f'; in prefill {binary_bytes(weights + made)} with the new keys and values'
  for remark in [*_remarks(e), *_link_remarks(e, mesh)]:
    lines += _wrap(f'* {remark}')
  return '\n'.join(lines) + '\n'


def weights_notation(layout: Layout) -> str:
  """Return the stored weights' split in the paper's notation, e.g. E_xF_zy."""
  return _split('E', layout.stored_embed) + _split('F', layout.stored_hidden)


def sharding_text(tensor: ExplainedTensor, mesh: Mapping[str, int]) -> str:
  """Return a tensor's split, e.g. 'L E_x hidden_zy'. Axes of size 1 are left out."""
  return ' '.join(
    _split(_LETTERS.get(axis, axis), _several(split, mesh))
    for axis, split in zip(tensor.axes, tensor.split, strict=True)
  )


def _table(tensors: Sequence[ExplainedTensor], s: ExplainSetting) -> Iterator[str]:
  rows = [_HEADER]
  for t in tensors:
    shape = (f'{t.arrays} of ' if t.arrays > 1 else '') + 'x'.join(map(str, t.shape))
    sharding, axes = sharding_text(t, s.mesh), ', '.join(t.axes)
    rows.append((t.name, shape, t.dtype, sharding, binary_bytes(t.bytes), axes))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  for *cells, count, axes in rows:
    left = '  '.join(cell.ljust(width) for cell, width in zip(cells, widths[:-2], strict=True))
    yield f'  {left}  {count.rjust(widths[-2])}  {axes}'


def _wrap(text: str) -> list[str]:
  """Break a text into lines of at most 120 characters, but not between a number and its unit."""
  text = re.sub(r' (?=([KMG]i)?B\b)', '\xa0', text)
  lines = textwrap.wrap(text, 120, subsequent_indent='    ', break_on_hyphens=False)
  return [line.replace('\xa0', ' ') for line in lines]


def _heading(s: ExplainSetting, mesh: Mesh | None) -> Iterator[str]:
  devices, links = '', ''
  if mesh is not None:
    devices = f' ({mesh.devices.flat[0].device_kind})'
    found = mesh_links(mesh) or {}
    links = ', '.join(f'{axis} {link}' for axis, link in found.items()) or 'no torus known'
    links = f'; links: {links}'
  yield from _wrap(f'model: {s.config}')
  yield f'mesh:  {shape_text(s.mesh)}, {num_shards(AXES, s.mesh)} devices{devices}{links}'
  rounded = f' ({s.batch} rounded up for the mesh)' if s.rows != s.batch else ''
  weights, cache = weight_format(s.weights).on_devices(s.dtype), s.cache or s.dtype
  yield from _wrap(
    f'pass:  B {s.rows}{rounded}, T {s.prompt_length} in prefill and 1 in decode, '
    f'S {s.cache_length}; {weights} weights, {s.dtype} activations, {cache} cache'
  )


def _phase_title(phase: ExplainedPhase) -> str:
  layout = phase.sharding.layout
  weights = f'weights {weights_notation(layout)} stay'
  if layout.gathered_axes:
    gathered = _split('E', layout.embed_axes) + _split('F', layout.hidden_axes)
    weights = (
      f'weights {weights_notation(layout)} gathered over {"".join(layout.gathered_axes)} '
      f'to {gathered}'
    )
  stream = ''.join(map(_split, 'BTE', phase.sharding.residual))
  return f'{phase.name}: {layout} ({weights}, activations {stream})'


def _attention(phase: ExplainedPhase, s: ExplainSetting) -> str:
  """Return the numbers of rows, heads and positions that each device attends with."""
  p = phase.sharding

  def share(name: str, count: int, axes: Axes) -> str:
    axes = _several(axes, s.mesh)
    by = f' ({"".join(axes)})' if axes else ''
    return f'{count // num_shards(axes, s.mesh)} of {count} {name}{by}'

  heads = p.heads.heads * num_shards(p.attention_heads, s.mesh)
  padding = heads - s.config.num_heads
  query_heads = share('query heads', heads, p.attention_heads)
  text = [
    share('rows', s.rows, p.attention_rows),
    query_heads + (f', {padding} of them padding' if padding else ''),
  ]
  if phase.length > 1:
    text.append(share('positions', phase.length, p.attention_positions))
  text.append(f'{p.heads.kv_heads} key head{"s" if p.heads.kv_heads > 1 else ""}')
  return f'attention, each device: {"; ".join(text)}'


def _collectives(phase: ExplainedPhase) -> str:
  """Return the bytes that a device sends in one layer, for each collective."""
  items = [
    f'{m.name} {m.kind.replace("_", "-")}({"".join(m.axes)}) {binary_bytes(round(m.moved))}'
    for m in phase.collectives
  ]
  total = binary_bytes(round(sum(m.moved for m in phase.collectives)))
  return f'a layer sends {total} from each device' + (f': {"; ".join(items)}' if items else '')


def _part(part: PackedPart) -> str:
  """Return a part's columns on each device, e.g. 'key, value 128 of 2048, 1536 padding'."""
  names = ', '.join(_PARTS.get(name, name) for name in part.names)
  counts = ((part.padding, 'padding'), (part.copies, 'copies'))
  notes = ' and '.join(f'{count} {kind}' for count, kind in counts if count)
  return f'{names} {part.width}' + (f' of {part.total}, {notes}' if notes else '')


def _remarks(e: Explanation) -> Iterator[str]:
  """Yield remarks on costs of time or memory that the tables do not show."""
  s = e.setting
  for phase in e.phases:
    p = phase.sharding
    used = p.attention_rows + p.attention_heads + p.attention_positions
    repeated = _several(tuple(a for a in AXES if a not in used), s.mesh)
    if repeated:
      yield (
        f'{phase.name}: attention splits neither rows nor heads nor positions over '
        f'{"".join(repeated)}; {num_shards(repeated, s.mesh)} devices along it do the same work'
      )
    if phase.gathered:
      yield (
        f'{phase.name}: weights are gathered matrix by matrix, the largest '
        f'{binary_bytes(phase.gathered)} on each device; one is in use and one in flight'
      )
  prefill, decode = e.phases
  if prefill.length != s.prompt_length:
    yield (
      f'prefill: {s.prompt_length} positions are padded to {prefill.length}, '
      'which divide over the mesh'
    )
  before, after = (
    sharding_text(t, s.mesh).removeprefix('L ')
    for t in (prefill.tensor('keys, values'), decode.tensor('cache'))
  )
  if before != after:
    yield f'after prefill, keys and values are resharded: {before} to {after}'


def _link_remarks(e: Explanation, mesh: Mesh | None) -> Iterator[str]:
  """Yield remarks on slow links between neighbours of the mesh."""
  for axis, link in ((mesh_links(mesh) if mesh is not None else None) or {}).items():
    if link == BROKEN:
      yield (
        f'some neighbours along {axis} are more than one link apart: '
        'another mesh shape may be faster'
      )


def _several(axes: Iterable[str], mesh: Mapping[str, int]) -> Axes:
  """Return the axes with more than one device."""
  return tuple(a for a in axes if mesh[a] > 1)


def _split(letter: str, axes: Axes) -> str:
  return f'{letter}_{"".join(axes)}' if axes else letter
