"""Capacity: the most choices that an expert takes of one global batch.

Shapes: T tokens on this device, E experts in all, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from custom_ops import make_plan


def within_capacity(ids_TK: jax.Array, num_experts: int, factor: float, axes: Sequence[str]) -> jax.Array:
    """The choices within the first ceil(factor * T * K / E) of their expert; -1 for the others.

    "First" in the order of tokens, T and the order being those of the global batch (GShard, algorithm 1, with the
    whole batch as one group): which choices are dropped does not depend on the layout.

    Args:
      axes: mesh axes over which the batch is split, inside `shard_map`.
    """
    T, K = ids_TK.shape
    devices = math.prod(jax.lax.axis_size(axis) for axis in axes)
    capacity = math.ceil(factor * devices * T * K / num_experts)
    plan = make_plan(ids_TK, num_experts)
    load_E = plan.group_sizes_P
    taken_E = jnp.zeros_like(load_E)  # by the devices before this one
    if axes:
        load_WE = jax.lax.all_gather(load_E, tuple(axes))
        is_before_W1 = jnp.arange(devices)[:, None] < jax.lax.axis_index(tuple(axes))
        taken_E = jnp.sum(jnp.where(is_before_W1, load_WE, 0), axis=0, dtype=jnp.int32)
    first_E = jnp.cumsum(load_E, dtype=jnp.int32) - load_E
    rank_TK = plan.position_TK + (taken_E - first_E)[jnp.maximum(ids_TK, 0)]
    return jnp.where(rank_TK < capacity, ids_TK, -1)
