"""Kernels and bytes of a program compiled for a GPU; counting them needs no GPU plugin."""

import importlib.util
import os
import subprocess
import sys

import pytest

# A loop of three turns, each of which reads half a matrix and a row and writes a row; then a copy.
TEXT = """
HloModule jit_f, is_scheduled=true

%product (p0: bf16[1,128], p1: bf16[128,256]) -> bf16[1,128] {
  %p0 = bf16[1,128]{1,0} parameter(0)
  %p1 = bf16[128,256]{1,0} parameter(1)
  %half = bf16[128,128]{1,0} slice(%p1), slice={[0:128], [0:128]}
  ROOT %dot = bf16[1,128]{1,0} dot(%p0, %half), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], bf16[1,128], bf16[128,256])) -> (s32[], bf16[1,128], bf16[128,256]) {
  %state = (s32[], bf16[1,128]{1,0}, bf16[128,256]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[1,128]{1,0} get-tuple-element(%state), index=1
  %w = bf16[128,256]{1,0} get-tuple-element(%state), index=2
  %gemm_fusion = bf16[1,128]{1,0} fusion(%x, %w), kind=kCustom, calls=%product
  ROOT %next = (s32[], bf16[1,128]{1,0}, bf16[128,256]{1,0}) tuple(%i, %gemm_fusion, %w)
}

%condition (state.1: (s32[], bf16[1,128], bf16[128,256])) -> pred[] {
  %state.1 = (s32[], bf16[1,128]{1,0}, bf16[128,256]{1,0}) parameter(0)
  ROOT %always = pred[] constant(true)
}

ENTRY %main (x.1: bf16[1,128], w.1: bf16[128,256]) -> bf16[1,128] {
  %x.1 = bf16[1,128]{1,0} parameter(0)
  %w.1 = bf16[128,256]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[1,128]{1,0}, bf16[128,256]{1,0}) tuple(%zero, %x.1, %w.1)
  %while = (s32[], bf16[1,128]{1,0}, bf16[128,256]{1,0}) while(%start), COUNTED
  %last = bf16[1,128]{1,0} get-tuple-element(%while), index=1
  ROOT %copy = bf16[1,128]{1,0} copy(%last)
}
""".replace(
  'COUNTED', 'condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}'
)


def test_launches_are_counted_with_their_loops(monkeypatch):
  for name in ('JAX_PLATFORMS', 'JAX_SKIP_CUDA_CONSTRAINTS_CHECK'):
    monkeypatch.setenv(
      name, os.environ.get(name, '')
    )  # the import below sets them: put back what was
  from benchmarks import gpu_compile

  found = gpu_compile.launches(TEXT, 2)
  turn = 2 * 128 * 128 + 2 * 2 * 128  # the half of the matrix that is used, a row in, a row out
  assert found.kernels == 4
  assert found.largest == ((3 * turn, 'gemm_fusion'), (2 * 2 * 128, 'copy'))
  assert found.bytes == 3 * turn + 2 * 2 * 128


@pytest.mark.skipif(
  importlib.util.find_spec('jax_plugins') is not None, reason='a jax plugin is installed'
)
def test_without_the_plugin_it_says_what_to_install(repository):
  result = subprocess.run(
    [sys.executable, '-m', 'benchmarks.gpu_compile'], cwd=repository, capture_output=True, text=True
  )
  assert result.returncode == 1 and 'pip install --no-deps jax-cuda13-pjrt' in result.stderr
