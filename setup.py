"""Installs t5x_inference_ext: from PyPI alone, without T5X."""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent

# Lower bounds are the oldest versions that the test suite ran with, constraints.txt the newest.
# No upper bounds: nothing here uses a deprecated API.
INSTALL_REQUIRES = [
  'absl-py>=2.3.1',
  'gin-config>=0.5',
  'jax>=0.10',
  'jinja2>=3.1.2',  # chat templates: 1.5 MB, for which an extra would not pay
  'jaxtyping>=0.3',  # shapes in annotations; without a type checker they cost nothing
  'ml_dtypes>=0.5.4',
  'msgpack>=1.1',
  'numpy>=2.2.6',
  'sentencepiece>=0.2',
  'tensorstore>=0.1.84',
  # tokenizer.json, which most checkpoints have: 12 MB, 38 with what it brings.
  'tokenizers>=0.22',
  'tqdm>=4.67.1',
]

# What a run over a seqio task needs; both bring TensorFlow, two thirds of a full environment.
SEQIO_REQUIRES = ['seqio>=0.0.20', 'tensorflow>=2.21']

# T5X is on GitHub only, and PyPI refuses a distribution whose metadata holds such a URL: drop this
# extra from an upload. docs/t5x.md lists the versions that ran together: T5X's own list floats.
T5X_REQUIRES = [
  *SEQIO_REQUIRES,
  't5x @ git+https://github.com/google-research/t5x@cc342d419ec3e3e9c4bf1df33c82330cafdc1e16',
  # What T5X imports without asking for it: the last for t5x.export alone.
  'grain>=0.2.18',
  'tensorboard>=2.21',
  'tensorflow-serving-api>=2.21',
]

# The TPU compiler and runtime; compiling needs no TPU. Not through jax[tpu], which pins an older
# version: an executable runs only with the version that compiled it.
LIBTPU = 'libtpu>=0.0.52'

PLOTS = 'matplotlib>=3.11'

# Models by their names: hf:OWNER/NAME.
HUB = 'huggingface_hub>=2.4'

# HTTP over the engine.
SERVER_REQUIRES = [
  'httptools>=0.9',  # with uvloop, half the processor time of a streamed token
  'prometheus_client>=0.26',
  'pydantic>=2.14',
  'starlette>=1.10',
  'uvicorn>=0.54',
  "uvloop>=0.23; sys_platform != 'win32'",
]

TEST_REQUIRES = [
  *SEQIO_REQUIRES,
  *SERVER_REQUIRES,
  HUB,
  PLOTS,  # figures are drawn in tests too
  'gguf>=0.19',  # the oracle of quantized blocks
  'httpx>=0.28',  # with openai, the clients of the server
  'hypothesis>=6.150.3',
  # Tests of the compiled programs; on a platform without it they are skipped, and say so.
  f"{LIBTPU}; sys_platform == 'linux' and platform_machine == 'x86_64'",
  'openai>=3.57',
  'pytest>=9.0.3',
  'pytest-xdist>=3.8',  # two test files at a time
  'safetensors>=0.8',  # the oracle of headers
  'selenium>=4.51',  # the server's page in Chromium, where there is one
  # tests/package_test.py builds the wheel without isolation; 70.1 no longer needs `wheel`.
  'setuptools>=70.1',
  # The checks that `make test` runs before pytest, and the checker of array types in tests.
  'beartype>=0.23',
  'mkdocs-material>=9.8',
  'mkdocstrings-python>=2.0',
  'mypy>=2.4',
  'ruff>=0.17',
]

# `make mutants`, which CI does not run, runs the tests too.
MUTANTS_REQUIRES = [*TEST_REQUIRES, 'cosmic-ray>=8.7', 'pytest-cov>=7.1']

setuptools.setup(
  name='t5x_inference_ext',
  version=re.search(
    r"^__version__ = '(.*)'",
    (ROOT / 't5x_inference_ext' / '__init__.py').read_text(encoding='utf-8'),
    re.MULTILINE,
  )[1],
  description='Fast partitioned inference of PaLM-style decoders, for T5X checkpoints',
  long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  license_files=['LICENSE'],
  # configs/ is found as t5x_inference_ext.configs, through a symbolic link in the checkout; the
  # wheel and the sdist hold real files. gin finds files by package: each directory is one.
  packages=setuptools.find_packages(include=['t5x_inference_ext', 't5x_inference_ext.*']),
  package_data={
    '': ['*.gin'],
    't5x_inference_ext.runs.selfcheck': ['golden.json'],
    't5x_inference_ext.server': ['page/*'],
  },
  python_requires='>=3.11',
  install_requires=INSTALL_REQUIRES,
  extras_require={
    'seqio': SEQIO_REQUIRES,
    't5x': T5X_REQUIRES,
    'tpu': [LIBTPU, 'requests>=2.32'],
    'plots': [PLOTS],
    'hub': [HUB],
    'server': SERVER_REQUIRES,
    'test': TEST_REQUIRES,
    'mutants': MUTANTS_REQUIRES,
  },
  entry_points={
    'console_scripts': [
      't5x_inference_ext-convert = t5x_inference_ext.commands.convert_checkpoint:run',
      't5x_inference_ext-inspect = t5x_inference_ext.commands.inspect_checkpoint:run',
      't5x_inference_ext-infer = t5x_inference_ext.commands.infer:run',
      't5x_inference_ext-plan = t5x_inference_ext.commands.plan:run',
      't5x_inference_ext-serve = t5x_inference_ext.commands.serve:run',
      't5x_inference_ext-precompile = t5x_inference_ext.commands.precompile:run',
      't5x_inference_ext-selfcheck = t5x_inference_ext.commands.selfcheck:run',
    ]
  },
  classifiers=[
    'Development Status :: 3 - Alpha',
    'Intended Audience :: Developers',
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3.11',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
