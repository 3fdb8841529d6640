"""Tokens numbered over the whole batch, and cut into groups that do not depend on how devices share them.

What a router decides for a group (capacity, budgets, rounding) and what it draws at random is then the same on every
layout.

Shapes: T tokens on this device, G groups of the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.mesh import ambient_mesh, token_axes
from moejax.routing.router import BadOption


def token_numbers(num_tokens: int) -> jax.Array:
    """Numbers of this device's tokens in the global batch, i32."""
    axes = _axes()
    first = jax.lax.axis_index(axes) * num_tokens if axes else 0
    return first + jnp.arange(num_tokens, dtype=jnp.int32)


def draw(
    sample: Callable[[jax.Array, tuple[int, ...]], jax.Array],
    key: jax.Array,
    num_tokens: int,
    shape: tuple[int, ...],
) -> jax.Array:
    """[T, *shape] random numbers, those of a token fixed by the key and its number alone.

    Args:
      sample: `jax.random.uniform`, `jax.random.normal`, ...
    """
    return jax.vmap(lambda number: sample(jax.random.fold_in(key, number), shape))(token_numbers(num_tokens))


def by_group(decide: Callable[..., Any], groups: int, *arrays: jax.Array, training: bool = True) -> Any:
    """Apply `decide` to each group of consecutive tokens of the global batch.

    A device that holds whole groups decides for itself. Otherwise the arrays are gathered from all devices (T * E
    numbers from each), and all decide the same. There is no gradient.

    Args:
      decide: from one group's arrays to a tree of arrays with the same leading dimension.
      arrays: leading dimension T.
      training: outside of it, where a batch may be as small as one token, the largest divisor of `groups` that divides
        the batch takes its place.

    Returns:
      The tree, with this device's T tokens.

    Raises:
      ValueError: the groups do not divide the tokens of the global batch.
    """
    axes = _axes()
    devices = math.prod(jax.lax.axis_size(axis) for axis in axes)
    num_tokens = arrays[0].shape[0]
    if num_tokens * devices % groups:
        if training:
            raise BadOption("groups", groups, f"must divide the {num_tokens * devices} tokens of a batch")
        groups = math.gcd(groups, num_tokens * devices)
    arrays = jax.lax.stop_gradient(arrays)
    whole_groups_here = groups % devices == 0
    if not whole_groups_here:
        arrays = tuple(jax.lax.all_gather(a, axes, tiled=True) for a in arrays)
    here = groups // devices if whole_groups_here else groups
    decided = jax.vmap(decide)(*(a.reshape(here, -1, *a.shape[1:]) for a in arrays))
    decided = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), decided)
    if whole_groups_here:
        return decided
    first = jax.lax.axis_index(axes) * num_tokens
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, num_tokens), decided)


def _axes() -> tuple[str, ...]:
    """Token axes over which this code runs once per device; none outside of `shard_map`, where arrays are global."""
    return tuple(axis for axis in token_axes() if axis in ambient_mesh().manual_axes)
