"""The program that saves replies, compiled for a TPU: it copies blocks, and nothing else."""

import dataclasses
import functools

import jax
from jax.sharding import NamedSharding
import numpy as np
import pytest

from t5x_inference_ext.config import preset
from t5x_inference_ext.engine import prefix_store, programs, reply_blocks
from t5x_inference_ext.engine.sampling import SamplingParams
from t5x_inference_ext.model.transformer import Model
from t5x_inference_ext.precompile import slices
from t5x_inference_ext.precompile.program import abstract_weights
from t5x_inference_ext.precompile.slot_programs import slot_program
from t5x_inference_ext.sharding.layout import Layout
from t5x_inference_ext.sharding.torus import parse_slice


@pytest.mark.libtpu
@pytest.mark.parametrize('cache, prefill', [('int8', 'ws_2d/heads'), ('bfloat16', 'wg_xyz/batch')])
def test_copies_are_in_place_on_tpus(cache, prefill):
  """The program lays out neither the slots' pages nor the store anew."""
  config = dataclasses.replace(preset('palm_8b'), num_layers=2)
  mesh = slices.slice_mesh(parse_slice('v4:2x2x2'), config, (2, 2, 2))
  layouts = Layout.parse(prefill), Layout.parse('ws_2d/batch')
  model = Model(config, mesh, *layouts, 'bfloat16', cache)
  weights = abstract_weights(model, 'int8')
  rows, blocks, size = model.prefilling.padded_batch(1), 512, 32
  _, (_, slots, *_) = slot_program('admit', model, weights, 64, 2048, 32, SamplingParams())
  empty = functools.partial(prefix_store.empty_store, model, rows=rows, blocks=blocks)
  store = jax.eval_shape(functools.partial(empty, block_size=size), weights)

  def place(spec, arrays):
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)

  store = jax.tree.map(place, prefix_store.store_spec(model, weights, rows), store)
  copies = prefix_store.block_copies([(1, 0, 0)], reply_blocks.REPLY_BLOCKS)
  lowered = programs.save_reply.lower(
    model, store, weights, slots, np.int32(0), copies, prompt_rows=rows
  )
  memory = lowered.compile().memory_analysis()
  block = prefix_store.bytes_per_block(model, weights, rows, size)
  assert memory.alias_size_in_bytes >= blocks * block
  assert memory.temp_size_in_bytes < 5 * block
