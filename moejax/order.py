"""Order among collectives, on CPU: what may not run at the same time is tied together by data.

XLA's CPU client runs whatever its operands are ready for, on several threads. Between two collectives, or two loops that
contain some, it only keeps the order in which they are *started*: once a loop has been started, a later collective that
uses none of its results runs beside those of the loop. There they meet under one name, since jax gives all collectives
the same channel: partners are mixed up, the process aborts or waits forever. A real data dependence is the only order
that holds at run time (an `optimization_barrier` is gone by then); it costs one selection per tied array, and nothing on
devices with streams, which are in order by themselves.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def after(tree: Tree, number: jax.Array) -> Tree:
    """The same arrays, but on CPU none of them is there before `number`, a loop's i32 result, is.

    Inside `shard_map` the arrays must vary over all axes over which `number` does. In backward the cotangents pass
    unchanged.
    """
    return jax.tree.map(lambda array: _after(array, number), tree)


@jax.custom_vjp
def _after(array: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(array, number, cpu=_tied, default=lambda array, _: array)


def _tied(array: jax.Array, number: jax.Array) -> jax.Array:
    # True for every number, but no pass of XLA's can tell.
    is_there = jax.lax.population_count(number) <= 32
    return jnp.where(is_there, array, jnp.zeros_like(array))


_after.defvjp(lambda array, number: (_after(array, number), None), lambda _, cotangent: (cotangent, None))
