"""The sandbox that chat templates run in.

Jinja's own keeps a template away from files and from Python's internal attributes. This one also
limits steps, time, sizes and memory: the operands and the result of each operation are checked.
"""

from collections.abc import Callable, Mapping
import contextvars
import datetime
import functools
import json
import sys
import time
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox, visitor

MAX_SIZE = 2**22  # maximum number of characters of a text, and of items of nested lists
MAX_STEPS = 10**6  # maximum number of loop iterations and macro calls in one rendering
MAX_SECONDS = 10  # maximum time of one rendering; templates of known models take milliseconds
_MAX_NUMBER = 10**18
_MAX_COUNT = 10**5  # maximum number of a filter that makes so many items or digits
_MAX_FORMAT = 100  # maximum number of characters of a date's format
# String methods whose result can be arbitrarily long, depending on a number.
_METHODS = ('format', 'format_map', 'center', 'ljust', 'rjust', 'zfill', 'expandtabs', 'translate')
_FILTERS = ('center', 'format', 'indent', 'wordwrap', 'urlize', 'pprint')
_COUNTING = ('batch', 'slice', 'round')
_CHEAP = ('length', 'count', 'first', 'default', 'd')  # not checked: they look at no item
_BYTES = ('encode', 'to_bytes')  # methods that make bytes, which no check looks into

_ITEMS, _MADE_BYTES = 100, 1024  # that many items inspected, or bytes made, count as one step

_steps: contextvars.ContextVar[int] = contextvars.ContextVar('steps', default=0)
_end: contextvars.ContextVar[float] = contextvars.ContextVar('end', default=float('inf'))


class LimitExceeded(Exception):
  """A template exceeded a limit. Messages continue "the chat template ..."."""


class MessagesRefused(Exception):
  """A template called raise_exception: it does not support these messages."""


def start_steps() -> None:
  """Reset the step counter and the clock, before a rendering."""
  _steps.set(0)
  _end.set(time.monotonic() + MAX_SECONDS)


def compile_template(source: str) -> jinja2.Template:
  """Return a template that runs within the limits.

  Raises:
    jinja2.TemplateSyntaxError: The source is not a template.
  """
  environment = _environment()
  tree = _Bounds().visit(environment.parse(source))
  return environment.from_string(tree)


class _Bounds(visitor.NodeTransformer):
  """Inserts checks into a parsed template, for operations that _Sandbox does not intercept."""

  def _counted(self, node: Any) -> Any:
    self.generic_visit(node)
    return self._body_counted(node)

  def _body_counted(self, node: Any) -> Any:
    node.body.insert(0, nodes.Output([_filter(nodes.Const(''), 'count_step')]))
    return node

  visit_Macro = visit_CallBlock = _counted

  def _test_counted(self, node: Any) -> Any:
    self.generic_visit(node)
    if node.test is not None:
      node.test = nodes.And(_filter(nodes.Const(True), 'count_step'), node.test)
    return node

  visit_If = visit_CondExpr = _test_counted

  def visit_For(self, node: Any) -> Any:  # noqa: N802
    return self._body_counted(self._test_counted(node))

  def visit_Concat(self, node: Any) -> Any:  # noqa: N802
    self.generic_visit(node)
    node.nodes = [_filter(each, 'bounded') for each in node.nodes]
    return _filter(node, 'made')

  def visit_AssignBlock(self, node: Any) -> Any:  # noqa: N802
    self.generic_visit(node)
    node.filter = _filter(node.filter, 'made')
    return node

  def visit_Assign(self, node: Any) -> Any:  # noqa: N802
    self.generic_visit(node)
    node.node = _bounded_node(node.node)
    return node

  def visit_With(self, node: Any) -> Any:  # noqa: N802
    self.generic_visit(node)
    node.values = [_bounded_node(each) for each in node.values]
    return node

  def visit_Pair(self, node: Any) -> Any:  # noqa: N802
    self.generic_visit(node)
    node.key = _bounded_node(node.key)  # a key is hashed
    return node

  def visit_Compare(self, node: Any) -> Any:  # noqa: N802
    self.generic_visit(node)
    node.expr = _bounded_node(node.expr)
    for each in node.ops:
      each.expr = _bounded_node(each.expr)
    return node

  def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
    self.generic_visit(node)
    return _filter(node, 'made') if isinstance(node.arg, nodes.Slice) else node


def _filter(node: Any, name: str) -> nodes.Filter:
  return nodes.Filter(node, name, [], [], None, None)


def _bounded_node(node: Any) -> Any:
  return node if isinstance(node, nodes.Const) else _filter(node, 'bounded')


class _Generation(ext.Extension):
  """The tag `generation`, which marks an answer for training; it has no effect here."""

  tags = {'generation'}

  def parse(self, parser: Any) -> list[nodes.Node]:
    next(parser.stream)
    return parser.parse_statements(('name:endgeneration',), drop_needle=True)


class _Sandbox(sandbox.ImmutableSandboxedEnvironment):
  """Jinja's sandbox, in which operations can't make huge values."""

  intercepted_binops = frozenset(['+', '*', '**', '%'])

  def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
    """Compute left OPERATOR right."""
    if operator == '**' or (operator == '%' and isinstance(left, str)):
      raise LimitExceeded(f'uses {operator}, which is not allowed')
    if operator == '*':
      sizes = [
        len(value) if isinstance(value, (str, list, tuple)) else value for value in (left, right)
      ]
      if sizes != [left, right] and sizes[0] * sizes[1] > MAX_SIZE:
        raise LimitExceeded('makes a value that is too large')
    return _made(super().call_binop(context, operator, left, right))

  def getitem(self, obj: Any, argument: Any) -> Any:
    """Return an item, whose key is hashed."""
    return super().getitem(obj, _bounded(argument))

  def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function or a method."""
    _check_replaced(getattr(function, '__self__', None), *args)
    for arg in (*args, *kwargs.values()):
      _bounded(arg)
    return _made(super().call(context, function, *args, **kwargs))

  def wrap_str_format(self, value: Any) -> None:
    """Return None, so that Jinja does not wrap str.format; is_safe_attribute forbids it instead."""

  def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
    """Return whether a template may use an attribute."""
    if attr in _BYTES or (isinstance(obj, str) and attr in _METHODS):
      return False
    return super().is_safe_attribute(obj, attr, value)


@functools.cache
def _environment() -> jinja2.Environment:
  """Return the sandbox, with the functions and filters that transformers gives to templates."""
  environment = _Sandbox(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[ext.LoopControlExtension, _Generation],
    finalize=_bounded,
  )
  filters: Mapping[str, Callable] = {**environment.filters, 'tojson': _to_json, 'join': _join}
  environment.filters = {
    name: function if name in _CHEAP else _with_bounds(function, name)
    for name, function in filters.items()
    if name not in _FILTERS
  }
  environment.filters |= {'bounded': _bounded, 'made': _made, 'count_step': _count_step}
  environment.tests = {name: _with_bounds(test, name) for name, test in environment.tests.items()}
  environment.globals |= {'raise_exception': _refuse, 'strftime_now': _now}
  del environment.globals['lipsum']
  return environment


def _with_bounds(function: Any, name: str) -> Callable:
  """Wrap a filter or test, so that its arguments and the size of its result are checked."""

  @functools.wraps(function)  # copies Jinja's attribute that says which arguments the filter gets
  def bounded(*args: Any, **kwargs: Any) -> Any:
    for arg in (given := (*args, *kwargs.values())):
      _bounded(arg)
      if name in _COUNTING and isinstance(arg, int) and arg > _MAX_COUNT:
        raise LimitExceeded(f'uses {name} with a number above {_MAX_COUNT}')
    if name == 'replace':
      _check_replaced(*(arg for arg in given if isinstance(arg, str)))
    return _made(function(*args, **kwargs))

  return bounded


def _check_replaced(text: Any = '', *args: Any) -> None:
  """Raise LimitExceeded if a text's method such as `replace` may make too long a text of these."""
  given = sum(len(arg) for arg in args if isinstance(arg, (str, list, tuple)))
  if isinstance(text, str) and (len(text) + 1) * given > 16 * MAX_SIZE:
    raise LimitExceeded('makes a text that is too long')


def _bounded(value: Any) -> Any:
  """Return a value unchanged; raise LimitExceeded for a number, text or list that is too large."""
  left, todo, seen = MAX_SIZE, [value], 0
  while todo:
    each = todo.pop()
    seen += 1
    if isinstance(each, str):
      left -= len(each)
    elif isinstance(each, int):
      left -= 1 if abs(each) <= _MAX_NUMBER else MAX_SIZE + 1
    elif isinstance(each, (list, tuple, set, frozenset)):
      left -= len(each)
      todo += each if left >= 0 else ()
    elif isinstance(each, dict):
      left -= len(each)
      todo += (*each.keys(), *each.values()) if left >= 0 else ()
    if left < 0:
      raise LimitExceeded('makes a value that is too large')
  _take_steps(seen // _ITEMS)
  return value


def _made(value: Any) -> Any:
  """Return a new value unchanged; raise LimitExceeded if it or the sum of them is too large."""
  _take_steps(sys.getsizeof(value, 0) // _MADE_BYTES)
  return _bounded(value)


def _take_steps(count: int) -> None:
  _steps.set(_steps.get() + count)
  if _steps.get() > MAX_STEPS:
    raise LimitExceeded(f'takes more than {MAX_STEPS} steps, or makes more than 1 GB of values')
  if time.monotonic() > _end.get():
    raise LimitExceeded(f'takes more than {MAX_SECONDS} s')


@jinja2.pass_context  # keeps Jinja from calling it at compile time
def _count_step(context: Any, value: Any) -> Any:
  _take_steps(1)
  return value


def _join(value: Any, separator: str = '', attribute: str | None = None) -> str:
  """Return items as one text."""
  items = [str(item[attribute] if attribute else item) for item in map(_bounded, value)]
  _bounded(items)
  if len(items) * len(separator) > MAX_SIZE:
    raise LimitExceeded('makes a text that is too long')
  return separator.join(items)


def _refuse(message: str) -> None:
  raise MessagesRefused(message)


def _now(form: str) -> str:
  if len(form) > _MAX_FORMAT:
    raise LimitExceeded(f'uses a date format of more than {_MAX_FORMAT} characters')
  return datetime.datetime.now().strftime(form)


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """Return a value as JSON, without the HTML escapes of Jinja's own filter."""
  if indent is not None and not 0 <= indent <= 16:
    raise LimitExceeded('asks for JSON with an indent above 16')
  if separators is not None and sum(map(len, separators)) > 16:
    raise LimitExceeded('asks for JSON with separators of more than 16 characters')
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )
