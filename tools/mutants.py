"""Change random places of a room, one at a time, and run the tests that cover each.

    python tools/mutants.py quantization --count=10 --seed=0
    python tools/mutants.py checkpoints/readers checkpoints/arrays.py

cosmic-ray's operators make the mutants: numbers, arithmetic, comparisons, boolean operators and
constants, branches, loops. Everything runs in a copy of the checkout, in build/mutants. The tests
run once, with coverage by test. Each mutant then meets the tests that run its statement and, should
it survive them, the whole files of these tests: a compiled or cached function runs in the first
test alone. PYTEST_ADDOPTS holds further options of pytest, such as "-m 'not libtpu'".
"""

import argparse
import ast
import collections
from collections.abc import Iterator
import os
import pathlib
import random
import re
import shlex
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

from cosmic_ray import mutating, plugins, testing
from cosmic_ray.ast import ast_nodes, get_ast
import coverage

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = pathlib.Path('t5x_inference_ext')
PYTEST = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider']
OPERATORS = re.compile(
  'core/(NumberReplacer|AddNot|ZeroIterationForLoop|Replace(True|False|And|Or|Break|Continue)With.*'
  '|ReplaceUnaryOperator_(USub_UAdd|Delete_Not)|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div'
  '|Mul_FloorDiv|Div_Mul|Div_FloorDiv|FloorDiv_Mul|FloorDiv_Div|Mod_FloorDiv|Mod_Mul|Pow_Mul'
  '|RShift_LShift|LShift_RShift|BitOr_BitAnd|BitAnd_BitOr)|ReplaceComparisonOperator_(Eq_NotEq'
  '|NotEq_Eq|Lt_LtE|Lt_GtE|LtE_Lt|LtE_Gt|Gt_GtE|Gt_LtE|GtE_Gt|GtE_Lt|Is_IsNot|IsNot_Is))'
)


class Mutant(NamedTuple):
  """One change of one module."""

  path: pathlib.Path
  line: int
  operator: Any
  occurrence: int


def left_alone(tree: ast.Module) -> Iterator[ast.AST | None]:
  """Yield the nodes in which a mutant would say nothing about the tests."""
  for node in ast.walk(tree):
    match node:
      case (
        ast.Raise()
        | ast.Assert()
        | ast.FunctionDef(name='__repr__' | '__str__')
        | ast.If(test=ast.Name(id='TYPE_CHECKING') | ast.Attribute(attr='TYPE_CHECKING'))
        | ast.Call(func=ast.Attribute(value=ast.Name(id='logging' | 'warnings')))
        | ast.Call(func=ast.Attribute(attr='dataclass'))
        # Paths and texts: another operator than / and + is only a TypeError.
        | ast.BinOp(left=ast.Constant(value=str()) | ast.JoinedStr())
        | ast.BinOp(right=ast.Constant(value=str()) | ast.JoinedStr())
      ):
        yield node
    yield getattr(node, 'annotation', None)
    yield getattr(node, 'returns', None)


def mutants(path: pathlib.Path) -> Iterator[tuple[tuple[int, int], Mutant]]:
  """Yield the position (line, column) and the mutant, for each mutant of a module."""
  source = path.read_text(encoding='utf-8')
  nodes = [node for node in left_alone(ast.parse(source)) if node]
  spans = [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes]
  for name in filter(OPERATORS.fullmatch, plugins.operator_names()):
    operator = plugins.get_operator(name)()
    parsed = ast_nodes(get_ast(source))
    positions = ((node, start) for node in parsed for start, _ in operator.mutation_positions(node))
    for occurrence, (node, start) in enumerate(positions):
      # The star of a signature or of {**fields} is no product.
      star = getattr(node, 'value', '') in ('*', '**') and node.parent.type not in ('term', 'power')
      if not star and not any(first <= start < last for first, last in spans):
        yield start, Mutant(path, start[0], operator, occurrence)


def draw(rooms: list[str], count: int, seed: int) -> list[Mutant]:
  """Return random mutants: positions with equal chances, then one mutant of each position."""
  found = collections.defaultdict(list)
  for path in (PACKAGE / room for room in rooms):
    for module in sorted(path.rglob('*.py')) if path.is_dir() else [path]:
      for position, mutant in mutants(module):
        found[module, position].append(mutant)
  generator = random.Random(seed)
  order = generator.sample(sorted(found), min(count, len(found)))
  return sorted(
    (generator.choice(found[position]) for position in order), key=lambda mutant: mutant[:2]
  )


def covering(mutant: Mutant, data: coverage.CoverageData) -> list[str]:
  """Return the tests that run the mutated statement, or its module where it runs at import."""
  lines = range(0)
  for node in ast.walk(ast.parse(mutant.path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.stmt) and node.lineno <= mutant.line <= (node.end_lineno or 0):
      # The walk goes inwards, so the innermost statement stays. A block's own lines are its first.
      block = hasattr(node, 'body') and not isinstance(node, ast.FunctionDef)
      last = max(node.lineno, node.body[0].lineno - 1) if block else node.end_lineno
      lines = range(node.lineno, last + 1)
  contexts = data.contexts_by_lineno(str(mutant.path.resolve()))
  tests = {context for line in lines for context in contexts.get(line, ())}
  if tests == {''}:
    tests.update(*contexts.values())
  return sorted({context.rpartition('|')[0] for context in tests} - {''})


def outcome(mutant: Mutant, tests: list[str], timeout: float) -> tuple[str, str]:
  """Return the changed line, and how the tests took it."""
  with mutating.use_mutation(*mutant[:1], *mutant[2:]) as (before, after):
    lines = zip(before.splitlines(), after.splitlines())
    change = next(f'{old.strip()}  ->  {new.strip()}' for old, new in lines if old != new)
    if not tests:
      return change, 'survived: no test runs the line'
    for chosen in tests, sorted({test.partition('::')[0] for test in tests}):
      result, output = testing.run_tests(shlex.join([*PYTEST, '-x', *chosen]), timeout)
      if output == 'timeout':
        return change, f'timeout after {timeout:.0f} s'
      if result != testing.TestOutcome.SURVIVED:
        killer = re.search('^(?:FAILED|ERROR) (.*?)(?: - .*)?$', output, re.MULTILINE)
        return change, f'killed by {killer[1] if killer else output[-300:]}'
  return change, f'survived {len(tests)} tests that run the line'


def main() -> None:
  """Print a line for each mutant, then the share that was killed."""
  parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
  parser.add_argument('rooms', nargs='+', help=f'folders or modules, from {PACKAGE}/')
  parser.add_argument('--count', type=int, default=10)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--tests', nargs='*', help="default: the rooms' own folders of tests/")
  parser.add_argument('--timeout', type=float, default=600, help='seconds, for a run of tests')
  parser.add_argument('--coverage', help="an earlier draw's file, of the same sources and tests")
  flags = parser.parse_args()
  tests = flags.tests or sorted({f'tests/{pathlib.Path(room).parts[0]}' for room in flags.rooms})

  root = ROOT / 'build' / 'mutants' / '-'.join(flags.rooms).replace('/', '.')
  measured = pathlib.Path(flags.coverage or f'{root}.coverage').resolve()
  shutil.rmtree(root, ignore_errors=True)
  skipped = shutil.ignore_patterns('.git', '.venv*', '.*_cache', 'build', 'site', '__pycache__')
  shutil.copytree(ROOT, root, symlinks=True, ignore=skipped)
  os.chdir(root)
  # Without bytecode: of two changes within a second Python would run the first.
  os.environ.update(PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE='1', COVERAGE_FILE=str(measured))

  if not flags.coverage:
    print(f'coverage by {" ".join(tests)}, into {measured}', flush=True)
    measure = [f'--cov={PACKAGE}', '--cov-context=test', '--cov-report=']
    if subprocess.run([*PYTEST, *tests, *measure]).returncode:
      sys.exit('A test fails without any mutant.')
  data = coverage.CoverageData(str(measured))
  data.read()

  killed = 0
  chosen = draw(flags.rooms, flags.count, flags.seed)
  for mutant in chosen:
    change, result = outcome(mutant, covering(mutant, data), flags.timeout)
    killed += not result.startswith('survived')
    print(f'{mutant.path}:{mutant.line}  {change}\n    {result}', flush=True)
  print(f'{" ".join(flags.rooms)}, seed {flags.seed}: {killed} of {len(chosen)} killed')


if __name__ == '__main__':
  main()
