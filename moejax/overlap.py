"""Overlap on GPUs: the chunks of a layer go through its stages as through a pipeline, each under another's products.

XLA's scheduler starts what it may start. Left to itself it sends all chunks to their nodes before it sends the first
one on, which leaves no product for the way between nodes to hide under. An `optimization_barrier` binds it: on GPUs it
is in the program until that is scheduled, and costs nothing when it runs. On CPU nothing is added (there a barrier is
gone before; `moejax.order` keeps collectives apart).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import jax

from custom_ops.target import target

# What one stage hands to the next: the array that travels first, a floating one.
State = tuple[Any, ...]


def pipeline(stages: Sequence[Callable[..., State]], chunks: Iterable[State]) -> list[State]:
    """Every chunk through all stages, one tick behind the chunk before; the middle stage computes, the others travel.

    On GPUs, where a chunk is computed, its result does not set out before all that travels meanwhile has arrived, nor
    does what is on its way back go on before the result is there. In backward likewise.

    Args:
      stages: as many wires there, the computation, as many wires back.
    """
    states = list(chunks)
    middle = len(stages) // 2
    for tick in range(len(states) + len(stages) - 1):
        stage_of = {n: tick - n for n in range(len(states)) if 0 <= tick - n < len(stages)}
        computed = tick - middle
        travelling = [n for n in stage_of if n != computed]
        bound = bool(travelling) and computed in stage_of and target().platform != "cpu"
        if bound:  # what sets out here comes home in backward
            homeward = [n for n in travelling if stage_of[n] < middle]
            _tie_arrays(_tied_in_backward, states, computed, travelling, homeward)
        for n, stage in stage_of.items():
            states[n] = stages[stage](*states[n])
        if bound:
            homeward = [n for n in travelling if stage_of[n] > middle]
            _tie_arrays(_tied_in_forward, states, computed, travelling, homeward)
    return states


# The array of the chunk that is computed, and those that travel meanwhile, by the numbers of their chunks.
Arrays = tuple[jax.Array, dict[int, jax.Array]]


def _tie_arrays(
    tied: Callable[[Arrays, tuple[int, ...]], Arrays],
    states: list[State],
    computed: int,
    travelling: Sequence[int],
    homeward: Sequence[int],
) -> None:
    """Put the tied arrays in the place of the first of each state."""
    arrays = states[computed][0], {n: states[n][0] for n in travelling}
    result, travelled = tied(arrays, tuple(homeward))
    for n, array in {computed: result, **travelled}.items():
        states[n] = (array, *states[n][1:])


def _tie(arrays: Arrays, homeward: tuple[int, ...]) -> Arrays:
    """The result after all that travelled, and of that what is homeward after the result."""
    result, travelled = arrays
    after = lambda array, others: jax.lax.optimization_barrier((array, *others))[0]  # noqa: E731
    return after(result, travelled.values()), {
        n: after(array, [result]) if n in homeward else array for n, array in travelled.items()
    }


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _tied_in_forward(arrays: Arrays, homeward: tuple[int, ...]) -> Arrays:
    return _tie(arrays, homeward)


_tied_in_forward.defvjp(
    lambda arrays, homeward: (_tie(arrays, homeward), None), lambda homeward, _, cotangents: (cotangents,)
)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _tied_in_backward(arrays: Arrays, homeward: tuple[int, ...]) -> Arrays:
    return arrays


_tied_in_backward.defvjp(
    lambda arrays, homeward: (arrays, None), lambda homeward, _, cotangents: (_tie(cotangents, homeward),)
)
