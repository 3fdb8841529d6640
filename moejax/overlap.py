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

    On GPUs, where a chunk is computed, its result does not set out before all that travels meanwhile has arrived, nor
    does what is on its way back go on before the result is there. In backward likewise.
    """
    states = list(chunks)
    middle = len(stages) // 2
    for tick in range(len(states) + len(stages) - 1):
        stage_of = {n: tick - n for n in range(len(states)) if 0 <= tick - n < len(stages)}
        computed = tick - middle
        travelling = [n for n in stage_of if n != computed]
        bound = bool(travelling) and computed in stage_of and target().platform != "cpu"
        if bound:
            going = [n for n in travelling if stage_of[n] < middle]
            arrays = _backward_bound(states[computed][0], {n: states[n][0] for n in travelling}, going)
            for n, array in {computed: arrays[0], **arrays[1]}.items():
                states[n] = (array, *states[n][1:])
        for n, stage in stage_of.items():
            states[n] = stages[stage](*states[n])
        if bound:
            coming = [n for n in travelling if stage_of[n] > middle]
            arrays = _bound(states[computed][0], {n: states[n][0] for n in travelling}, coming)
            for n, array in {computed: arrays[0], **arrays[1]}.items():
                states[n] = (array, *states[n][1:])
    return states


# The arrays that travel while one is computed, by the numbers of their chunks.
Travelled = dict[int, jax.Array]


def _tie(result: jax.Array, travelled: Travelled, homeward: list[int]) -> tuple[jax.Array, Travelled]:
    """The result after all that travelled, and of that what is homeward after the result."""
    after = lambda array, others: jax.lax.optimization_barrier((array, *others))[0]  # noqa: E731
    return after(result, travelled.values()), {
        n: after(array, [result]) if n in homeward else array for n, array in travelled.items()
    }


def _bound(result: jax.Array, travelled: Travelled, homeward: list[int]) -> tuple[jax.Array, Travelled]:
    """In the forward program alone: the same arrays, tied."""
    tied = jax.custom_vjp(lambda result, travelled: _tie(result, travelled, homeward))
    tied.defvjp(
        lambda result, travelled: (_tie(result, travelled, homeward), None), lambda _, cotangents: cotangents
    )
    return tied(result, travelled)


def _backward_bound(
    result: jax.Array, travelled: Travelled, homeward: list[int]
) -> tuple[jax.Array, Travelled]:
    """In the backward program alone: their cotangents, tied."""
    same = jax.custom_vjp(lambda result, travelled: (result, travelled))
    same.defvjp(
        lambda result, travelled: ((result, travelled), None),
        lambda _, cotangents: _tie(cotangents[0], cotangents[1], homeward),
    )
    return same(result, travelled)
