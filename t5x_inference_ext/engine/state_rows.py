"""Placement of the rows' parameters and state on a mesh.

All arrays are replicated, except the history of tokens [B, V], which is split by rows like the
logits.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t5x_inference_ext.engine import cache_rows
from t5x_inference_ext.engine.state import DecodeState, RowParams
from t5x_inference_ext.model.transformer import Model


def state_specs(model: Model, state: DecodeState) -> DecodeState:
  """Return the PartitionSpec of each array in `state`: arrays or jax.ShapeDtypeStructs."""
  specs: DecodeState = jax.tree.map(lambda _: P(), state)
  if state.history is None:
    return specs
  split: Any = P(model.sampling_axes(len(state.ended)))
  return dataclasses.replace(specs, history=split)


def state_shardings(model: Model, state: DecodeState) -> DecodeState:
  """Return the sharding of each array in `state`."""
  shard = functools.partial(NamedSharding, model.mesh)
  return jax.tree.map(shard, state_specs(model, state), is_leaf=lambda x: isinstance(x, P))


def constrain_state(model: Model, state: DecodeState) -> DecodeState:
  """Constrain a state's arrays to the shardings of all programs, so that no step moves them."""
  return jax.tree.map(lax.with_sharding_constraint, state, state_shardings(model, state))


def put_state_row(
  model: Model,
  rows: RowParams,
  states: DecodeState,
  slot: jax.Array,
  row: RowParams,
  state: DecodeState,
) -> tuple[RowParams, DecodeState]:
  """Replace one row's parameters and state; return those of all rows.

  Args:
    model: Decides the mesh.
    rows: Parameters of B rows.
    states: State of B rows.
    slot: Scalar int32. Index of the row to replace.
    row: [1, ...]. The row's new parameters.
    state: [1, ...]. The row's new state.
  """

  def put(x: jax.Array, new: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), slot, 0)

  history = states.history
  if history is not None:
    assert state.history is not None
    axes = model.sampling_axes(len(states.ended))
    history = cache_rows.scatter_row(model, history, axes, slot, state.history)
  without = [dataclasses.replace(s, history=None) for s in (states, state)]
  rows, states = jax.tree.map(put, (rows, without[0]), (row, without[1]))
  return rows, constrain_state(model, dataclasses.replace(states, history=history))
