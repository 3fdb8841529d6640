"""Overlap on GPUs: the chunks of a layer go through its stages as through a pipeline, each under another's products.

XLA's scheduler starts what it may start. Left to itself it sends all chunks to their nodes before it sends the first
one on, which leaves no product for the way between nodes to hide under. An `optimization_barrier` binds it: on GPUs it
is in the program until that is scheduled, and costs nothing when it runs. On CPU nothing is added (there a barrier is
gone before; `moejax.order` keeps collectives apart).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from custom_ops.target import target

# What one stage hands to the next: the array that travels first, a floating one.
State = tuple[Any, ...]


def pipeline(stages: Sequence[Callable[..., State]], chunks: Iterable[State]) -> list[State]:
    """Every chunk through all stages, one tick behind the chunk before; the middle stage computes, the others travel.

    On GPUs what travels in the tick of a computation has arrived before its result sets out; in backward likewise.
    """
    states = list(chunks)
    middle = len(stages) // 2
    for tick in range(len(states) + len(stages) - 1):
        at = {number: tick - number for number in range(len(states)) if 0 <= tick - number < len(stages)}
        travelling = [number for number, stage in at.items() if stage != middle]
        computes = bool(travelling) and middle in at.values() and target().platform != "cpu"
        if computes:
            arrays, others = _gradient_after(states[tick - middle][0], [states[n][0] for n in travelling])
            for number, array in zip([tick - middle, *travelling], [arrays, *others], strict=True):
                states[number] = (array, *states[number][1:])
        for number, stage in at.items():
            states[number] = stages[stage](*states[number])
        if computes:
            result, *beside = states[tick - middle]
            states[tick - middle] = (_after(result, [states[n][0] for n in travelling]), *beside)
    return states


@jax.custom_vjp
def _after(array: jax.Array, others: list[jax.Array]) -> jax.Array:
    """The same array, but not there before the others, which are needed elsewhere too; no gradient flows to them."""
    return jax.lax.optimization_barrier((array, *others))[0]


_after.defvjp(lambda array, others: (_after(array, others), None), lambda _, cotangent: (cotangent, None))


@jax.custom_vjp
def _gradient_after(array: jax.Array, others: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    """All as they are, but the cotangent of the array is not there before those of the others."""
    return array, others


_gradient_after.defvjp(
    lambda array, others: ((array, others), None),
    lambda _, cotangents: (_after(cotangents[0], cotangents[1]), cotangents[1]),
)
