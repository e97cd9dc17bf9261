"""What documentation names exists: files, functions, links, pages, and arguments in docstrings."""

import ast
import importlib.util
import pathlib
import re

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / 't5x_inference_ext'
DOCS = ROOT / 'docs'
# `engine/scheduler.py:Scheduler.step` or `engine/programs.py`, below the package or the checkout.
REFERENCE = re.compile(r'`([\w/]+\.py)(?::([\w.]+))?`')
LIVES = ['docs/life_of_a_request.md', 'docs/life_of_a_weight.md']
PAGES = sorted(
  path.relative_to(ROOT).as_posix() for path in [*ROOT.glob('*.md'), *DOCS.rglob('*.md')]
)
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob('*.py'))


def _definitions(body, prefix=''):
  """Every name that a module or class body binds, methods and fields as `Class.name`."""
  for node in body:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      yield prefix + node.name
      if isinstance(node, ast.ClassDef):
        yield from _definitions(node.body, f'{prefix}{node.name}.')
    elif isinstance(node, ast.Assign | ast.AnnAssign):
      targets = node.targets if isinstance(node, ast.Assign) else [node.target]
      yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


@pytest.mark.parametrize('page', PAGES)
def test_named_files_and_functions_exist(page):
  references = set(REFERENCE.findall((ROOT / page).read_text(encoding='utf-8')))
  assert page not in LIVES or len(references) > 20
  missing = []
  for file, name in sorted(references):
    path = next((p for p in (PACKAGE / file, ROOT / file) if p.is_file()), None)
    if path is None:
      missing.append(file)
    elif name and name not in _definitions(ast.parse(path.read_text(encoding='utf-8')).body):
      missing.append(f'{file}:{name}')
  assert not missing


@pytest.mark.parametrize('page', PAGES)
def test_examples_import_what_exists(page):
  text = (ROOT / page).read_text(encoding='utf-8')
  for block in re.findall(r'^```python\n(.*?)^```', text, re.MULTILINE | re.DOTALL):
    body = ast.parse(block).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    if importlib.util.find_spec('t5x') is None:
      imports = [node for node in imports if not re.search(r'\bt5x\b', ast.unparse(node))]
    exec(compile(ast.Module(imports, []), page, 'exec'), {})
  for module in re.findall(r'python -m ((?:t5x_inference_ext|benchmarks)[\w.]+)', text):
    assert importlib.util.find_spec(module.rstrip('.')), module


@pytest.mark.parametrize('page', ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md'])
def test_links_of_the_pages_outside_the_site_lead_somewhere(page):
  """mkdocs checks those inside it."""
  for link in re.findall(r'\]\(([^)]+)\)', (ROOT / page).read_text(encoding='utf-8')):
    if '://' not in link:
      file, _, anchor = link.partition('#')
      assert (ROOT / file).is_file(), link
      if anchor:
        headings = re.findall(r'^#+ (.*)$', (ROOT / file).read_text(encoding='utf-8'), re.MULTILINE)
        assert anchor in {re.sub(r'[^\w -]', '', h).lower().replace(' ', '-') for h in headings}


def test_the_readme_is_short():
  assert (ROOT / 'README.md').read_text(encoding='utf-8').count('\n') <= 150


def test_every_room_has_a_page_of_the_reference():
  rooms = {path.parent.name for path in PACKAGE.glob('*/__init__.py')} - {'commands', 'configs'}
  pages = {path.stem for path in (DOCS / 'reference').glob('*.md')} - {'index', 'root'}
  assert rooms == pages


def test_ci_runs_the_readmes_test_command():
  assert '    make test ' in (ROOT / 'README.md').read_text(encoding='utf-8')
  assert (ROOT / '.ci' / 'run').read_text(encoding='utf-8').splitlines()[-1] == 'make test'


def test_the_checks_of_a_commit_are_those_of_make_test():
  hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text(encoding='utf-8'))
  makefile = (ROOT / 'Makefile').read_text(encoding='utf-8')
  (repository,) = hooks['repos']
  for hook in repository['hooks']:
    assert f'$(TEST) {hook["name"]}' in makefile


def test_figures_of_the_readme_are_those_of_the_benchmarks_page():
  """The plot and the README's table repeat numbers that docs/benchmarks.md explains."""
  script = ast.parse((ROOT / 'benchmarks' / 'headline_figure.py').read_text(encoding='utf-8'))
  (steps,) = [
    ast.literal_eval(node.value)
    for node in script.body
    if isinstance(node, ast.Assign) and node.targets[0].id == 'STEPS'
  ]
  page = (DOCS / 'benchmarks.md').read_text(encoding='utf-8')
  times = [time for step in steps.values() for time in step]
  assert len(times) == 6
  assert [time for time in times if f'| {time:g} ms' not in page] == []
  readme = (ROOT / 'README.md').read_text(encoding='utf-8')
  table = readme.partition('| | here |')[2].partition('\n\n')[0]
  numbers = set(re.findall(r'\d+\.\d+(?= ms| s|,)|(?<=\| )\d{2,}(?= \|| ms)', table))
  assert len(numbers) > 5
  assert {number for number in numbers if number not in page} == set()


def _documented(docstring):
  """The names of an `Args:` section, several before one colon included."""
  section = re.search(r'^Args:\n((?:  .*\n|\n)+)', f'{docstring}\n', re.MULTILINE)
  lines = re.findall(r'^  (\S[^:\n]*):', section[1], re.MULTILINE) if section else []
  return [name.strip().lstrip('*') for line in lines for name in line.split(',')]


@pytest.mark.parametrize('module', MODULES)
def test_docstrings_name_arguments_that_exist(module):
  wrong = []
  for node in ast.walk(ast.parse((PACKAGE / module).read_text(encoding='utf-8'))):
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
      continue
    function = node
    if isinstance(node, ast.ClassDef):  # a class documents the arguments of __init__, or its fields
      made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__']
      function = made[0] if made else None
    documented = _documented(ast.get_docstring(node) or '')
    if function is None:
      names = set(_definitions(node.body))
    else:
      a = function.args
      every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
      names = {each.arg for each in every}
    wrong += [f'{node.name}: {name}' for name in documented if name not in names]
  assert not wrong
