"""Environment of every test: eight simulated CPU devices, exact float32, checked array shapes."""

import importlib.util
import os
import pathlib
from unittest import mock

# Before the first import of jax or TensorFlow: both read their environment once.
_DEVICES = '--xla_force_host_platform_device_count'
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}=8'.strip()
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# A test must compile what it tests, and leave the user's cache of compiled programs alone. Commands
# that tests start inherit this.
os.environ['JAX_ENABLE_COMPILATION_CACHE'] = '0'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

from tests import typecheck  # noqa: E402

# Before the first import of the package: every function of these modules checks the types and
# shapes in its annotations. The planner calls quantization.formats, which has no arrays, 500,000
# times in a search.
jaxtyping.install_import_hook(
  [
    't5x_inference_ext.model',
    't5x_inference_ext.quantization.gptq',
    't5x_inference_ext.quantization.int8',
    't5x_inference_ext.quantization.kv',
    't5x_inference_ext.quantization.rounding',
    't5x_inference_ext.engine.advance',
    't5x_inference_ext.engine.sampling_arrays',
    't5x_inference_ext.engine.selection',
    't5x_inference_ext.engine.state',
  ],
  f'{typecheck.__name__}.typecheck',
)

# The golden logits were computed at this precision.
jax.config.update('jax_default_matmul_precision', 'highest')
# A missing axis is a mistake here, never meant: every broadcast in the package is written out.
jax.config.update('jax_numpy_rank_promotion', 'raise')

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_configure(config):
  config.addinivalue_line(
    'markers', 'libtpu: compiles for a TPU slice; needs libtpu, the TPU compiler, and no TPU.'
  )


def pytest_collection_modifyitems(items):
  if importlib.util.find_spec('libtpu') is None:
    for item in items:
      if item.get_closest_marker('libtpu'):
        item.add_marker(
          pytest.mark.skip(reason='libtpu, the TPU compiler, is not installed (extra `test`)')
        )


@pytest.fixture(autouse=True, scope='module')
def no_compiled_programs_left():
  """Drop compiled programs after each module.

  A program takes several memory maps. Linux lets a process have 65530: too few for the suite.
  """
  yield
  jax.clear_caches()


@pytest.fixture(scope='module')
def quick_programs():
  """Compile a module's engine programs without optimizations: for tests of results alone."""
  from t5x_inference_ext.engine import programs
  from tests import memory

  compiled = [p for p in vars(programs).values() if isinstance(p, programs.Program)]
  with mock.patch.object(programs, 'compiler_options', lambda *_: memory.QUICK_OPTIONS):
    for program in compiled:
      program.jitted.clear()
    yield
  for program in compiled:
    program.jitted.clear()


@pytest.fixture(scope='session')
def repository() -> pathlib.Path:
  """The root of the checkout."""
  return ROOT


@pytest.fixture(scope='session')
def testdata() -> pathlib.Path:
  return ROOT / 'tests' / 'testdata'


@pytest.fixture(scope='session')
def palm_tiny() -> pathlib.Path:
  """The T5X checkpoint of the demo: legacy format, scanned, trained, without optimizer state."""
  return ROOT / 'examples' / 'palm_tiny' / 'checkpoint_1000'


@pytest.fixture(scope='session')
def golden() -> pathlib.Path:
  """Results of T5X with palm_tiny: greedy.json, logits.npz, scores.json, heldout_tokens.npy."""
  return ROOT / 'tests' / 'testdata' / 'golden'
