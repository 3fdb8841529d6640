"""Overlap on GPUs: in which order the pieces of a layer's tokens travel, so that each goes under another's products.

XLA's scheduler starts what it may start. Left to itself it sends all pieces to their nodes before it sends the first
one on, which leaves no product for the way between nodes to hide under. An `optimization_barrier` binds it: on GPUs it
is in the program until that is scheduled, and costs nothing when it runs. On CPU nothing is added (there a barrier is
gone before; `moejax.order` keeps collectives apart).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from custom_ops.target import target
from custom_ops.varying import vary_alike


def in_turn(step: Callable[..., tuple[Any, ...]], items: Iterable[tuple[Any, ...]], ahead: int) -> list[Any]:
    """`[step(*item) for item in items]`, of which on GPUs item n sets out when the result of n - `ahead` is there.

    In backward likewise: the cotangents of that result set out when those of item n are there.

    Args:
      step: takes and returns tuples whose first field is the array that travels, a floating one.
      ahead: items that may be under way; 0: all.
    """
    results: list[tuple[Any, ...]] = []
    for number, (array, *others) in enumerate(items):
        if number >= ahead > 0:
            earlier, *beside = results[number - ahead]
            earlier, array = _both(earlier, array)
            results[number - ahead] = (earlier, *beside)
        results.append(step(array, *others))
    return results


def _both(one: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both as they are, but neither is there before both are, nor are their cotangents."""
    if target().platform == "cpu":
        return one, other
    one, other = jax.lax.optimization_barrier(vary_alike(one, other))
    return one, other
