"""The sandbox that chat templates run in.

Jinja's own sandbox keeps a template away from the file system and from Python's internal
attributes. This sandbox also limits the number of steps and the sizes of values, so that a template
can't use up time or memory.
"""

from collections.abc import Callable, Mapping
import contextvars
import datetime
import functools
import json
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox, visitor

MAX_SIZE = 2**22  # maximum number of characters of a text, and of items of nested lists
MAX_STEPS = 10**6  # maximum number of loop iterations and macro calls in one rendering
_MAX_NUMBER = 10**18
# String methods whose result can be arbitrarily long, depending on a number.
_METHODS = ('format', 'format_map', 'center', 'ljust', 'rjust', 'zfill', 'expandtabs', 'translate')
_FILTERS = ('center', 'format', 'indent', 'wordwrap', 'urlize', 'pprint')

# Number of list items whose inspection counts as one step.
_ITEMS = 100

_steps: contextvars.ContextVar[int] = contextvars.ContextVar('steps', default=0)


class LimitExceeded(Exception):
  """A template exceeded a limit. Messages continue "the chat template ..."."""


class MessagesRefused(Exception):
  """A template called raise_exception: it does not support these messages."""


def start_steps() -> None:
  """Reset the step counter, before a rendering."""
  _steps.set(0)


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
    node.body.insert(0, nodes.Output([_filter(nodes.Const(''), 'count_step')]))
    return node

  visit_For = visit_Macro = visit_CallBlock = _counted

  def visit_Concat(self, node: Any) -> Any:  # noqa: N802
    self.generic_visit(node)
    node.nodes = [_filter(each, 'bounded') for each in node.nodes]
    return _filter(node, 'bounded')

  def visit_AssignBlock(self, node: Any) -> Any:  # noqa: N802
    self.generic_visit(node)
    node.filter = _filter(node.filter, 'bounded')
    return node


def _filter(node: Any, name: str) -> nodes.Filter:
  return nodes.Filter(node, name, [], [], None, None)


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
    return _bounded(super().call_binop(context, operator, left, right))

  def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function or a method."""
    owner = getattr(function, '__self__', None)
    if isinstance(owner, str):  # a method such as replace
      given = sum(len(arg) for arg in args if isinstance(arg, (str, list, tuple)))
      if (len(owner) + 1) * given > 16 * MAX_SIZE:
        raise LimitExceeded('makes a text that is too long')
      for arg in args:
        _bounded(arg)
    return _bounded(super().call(context, function, *args, **kwargs))

  def wrap_str_format(self, value: Any) -> None:
    """Return None, so that Jinja does not wrap str.format; is_safe_attribute forbids it instead."""

  def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
    """Return whether a template may use an attribute."""
    if isinstance(obj, str) and attr in _METHODS:
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
    name: _with_bounds(function) for name, function in filters.items() if name not in _FILTERS
  }
  environment.filters |= {'bounded': _bounded, 'count_step': _count_step}
  environment.globals |= {'raise_exception': _refuse, 'strftime_now': _now}
  del environment.globals['lipsum']
  return environment


def _with_bounds(function: Callable) -> Callable:
  """Wrap a filter, so that the sizes of its arguments and of its result are checked."""

  @functools.wraps(function)  # copies Jinja's attribute that says which arguments the filter gets
  def bounded(*args: Any, **kwargs: Any) -> Any:
    for arg in (*args, *kwargs.values()):
      _bounded(arg)
    return _bounded(function(*args, **kwargs))

  return bounded


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


def _take_steps(count: int) -> None:
  _steps.set(_steps.get() + count)
  if _steps.get() > MAX_STEPS:
    raise LimitExceeded(f'takes more than {MAX_STEPS} steps')


@jinja2.pass_context  # keeps Jinja from calling it at compile time
def _count_step(context: Any, value: str) -> str:
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
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )
