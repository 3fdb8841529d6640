"""Order among collectives on CPU: what may not run at the same time is tied together by data.

XLA's CPU client runs whatever its operands are ready for, on several threads. Collectives of one computation it starts
in order and runs to their end; but between a loop with collectives inside and a collective (or another loop) outside it
keeps the order of the starts only (by its source none at all in programs that come from the compilation cache). Side by
side they meet under one name, since jax gives all collectives the same channel: the process aborts, crashes or hangs.
Of all orders only a data dependence holds at run time (an `optimization_barrier` is gone by then). It costs a selection
per array, and nothing on devices whose streams keep the order by themselves.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax.mesh import ambient_mesh

Tree = TypeVar("Tree")

# What ties carry. Remat policies save it under this name: to be formed again it would need all that is waited for.
ORDER = "moejax_order"


def after(tree: Tree, others: Any) -> Tree:
    """The same arrays, but on CPU none is there before all of `others` are; in backward, neither are their cotangents.

    Inside `shard_map` each device waits for its own part, and all arrays of `tree` must vary over the mesh axes over
    which `others` do. No gradient flows to `others`.
    """
    number = _number(jax.lax.stop_gradient(others))
    return jax.tree.map(lambda array: _after(array, number), tree)


def together(tree: Tree) -> Tree:
    """The same arrays, but on CPU none is there before all are; in backward, the same of their cotangents.

    For use inside `shard_map`; all arrays must vary over the same mesh axes.
    """
    return _together(tree)


def waiting(tree: Tree, others: Any) -> Tree:
    """`after` for what need not be differentiated."""
    number = _number(others)
    return jax.tree.map(lambda array: _tied(array, number), tree)


def gradients_first(x: jax.Array, params: Any) -> tuple[jax.Array, Any]:
    """Both as they are, but on CPU the cotangent of x is not there before those of `params` are."""
    return _gradients_first(x, params)


@jax.custom_vjp
def _gradients_first(x: jax.Array, params: Any) -> tuple[jax.Array, Any]:
    return x, params


_gradients_first.defvjp(
    lambda x, params: ((x, params), None),
    lambda _, cotangents: (waiting(cotangents[0], cotangents[1]), cotangents[1]),
)


@jax.custom_vjp
def _after(array: jax.Array, number: jax.Array) -> jax.Array:
    return _tied(array, number)


_after.defvjp(
    lambda array, number: (_tied(array, number), number),
    lambda number, cotangent: (_tied(cotangent, number), None),
)


@jax.custom_vjp
def _together(tree: Tree) -> Tree:
    return waiting(tree, tree)


_together.defvjp(
    lambda tree: (waiting(tree, tree), None), lambda _, cotangents: (waiting(cotangents, cotangents),)
)


def _number(tree: Any) -> jax.Array:
    """An i32 that depends on every array, zero-sized ones aside."""

    def of(array: jax.Array) -> jax.Array:
        first = jax.lax.slice(array, (0,) * array.ndim, (1,) * array.ndim).reshape(())
        if jnp.issubdtype(array.dtype, jnp.floating):
            return jax.lax.bitcast_convert_type(first.astype(jnp.float32), jnp.int32)
        return first.astype(jnp.int32)

    arrays = [array for array in jax.tree.leaves(tree) if array.size and _has_numbers(array)]
    return checkpoint_name(functools.reduce(operator.xor, map(of, arrays), jnp.int32(0)), ORDER)


def _has_numbers(array: jax.Array) -> bool:
    # Random keys have none that could be selected; they come from no collective.
    return array.dtype != jax.dtypes.float0 and not jnp.issubdtype(array.dtype, jax.dtypes.extended)


def _tied(array: jax.Array, number: jax.Array) -> jax.Array:
    if not _has_numbers(array) or ambient_mesh().size <= 1:
        return array
    return jax.lax.platform_dependent(array, number, cpu=_selected, default=lambda array, _: array)


def _selected(array: jax.Array, number: jax.Array) -> jax.Array:
    # True for every number, which no pass of XLA's can tell.
    return jnp.where(jax.lax.population_count(number) <= 32, array, jnp.zeros_like(array))
