"""Dispatch: the same step once per level on the way there, the experts, and the levels again on the way back.

    plan -> permute -> [exchange] -> the levels below -> [exchange back] -> unpermute

The recursion is written as stages, so that chunks can follow each other through them (`moejax.overlap`).

Shapes: T tokens on this device, D model width, K experts per token, N rows received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from custom_ops import DispatchPlan, make_plan
from moejax.exchange import Exchange
from moejax.kept import received
from moejax.levels import Levels
from moejax.overlap import pipeline

# (x_TD, plan, weights_TK) -> y_TD: each token's weighted sum over the experts of this device.
ExpertsFn = Callable[[jax.Array, DispatchPlan, jax.Array], jax.Array]


class Delivery(NamedTuple):
    """What one pass through all levels carried out.

    Fields:
      y_TD: weighted sums over the choices that were carried out; zero where there are none.
      served_TK: bool, which choices those are.
      fills: share of row buffers in use, one f32 scalar per level, the experts last.
      unsent: choices that stayed behind on this device because a bucket was full before it was sent, i32; what else
        was not carried out was refused by a receiver.
    """

    y_TD: jax.Array
    served_TK: jax.Array
    fills: tuple[jax.Array, ...]
    unsent: jax.Array


# A piece of this device's tokens, or what has arrived of it: x_TD, ids_TK, weights_TK.
Chunk = tuple[jax.Array, jax.Array, jax.Array]


def dispatch(chunks: Sequence[Chunk], *, levels: Levels, experts: ExpertsFn) -> list[Delivery]:
    """Carry the tokens of each chunk to the experts they chose and bring back the weighted sums of their outputs.

    Args:
      chunks: x_TD; ids_TK, the experts chosen, -1 for none; weights_TK.
      levels: those to go through; without expert parallelism there is only the experts' own.
    """
    there = [partial(_go, exchange) for exchange in levels.exchanges]
    back = [partial(_return, exchange) for exchange in reversed(levels.exchanges)]
    stages = [*there, partial(_compute, levels, experts), *back]
    return [Delivery(*result) for *result, _ in pipeline(stages, [(*chunk, ()) for chunk in chunks])]


def _go(exchange: Exchange, x_TD, ids_TK, weights_TK, way):
    """Through one wire: rows, ids and weights as they arrive, and all that has `Arrived` on the way."""
    arrived = exchange.dispatch(x_TD, ids_TK, weights_TK)
    return arrived.rows_ND, arrived.ids_NK, arrived.weights_NK, (*way, arrived)


def _compute(levels: Levels, experts: ExpertsFn, x_TD, ids_TK, weights_TK, way):
    """The experts' own level: fields of a `Delivery`."""
    if levels.exchanges:
        x_TD = received(x_TD)
    plan = make_plan(ids_TK, levels.experts_per_device)
    if levels.expert_rows is not None:
        plan = plan.at_most(levels.expert_rows)
    fill = jnp.sum(plan.group_sizes_P) / max(plan.choice_N.shape[0], 1)
    return experts(x_TD, plan, weights_TK), plan.served_TK, (fill.astype(jnp.float32),), jnp.int32(0), way


def _return(exchange: Exchange, y_ND, served_NK, fills, unsent, way):
    """Back through the last wire of the way: fields of a `Delivery` there."""
    *way, arrived = way
    y_TD, served_TK = exchange.combine(y_ND, served_NK, arrived.ticket)
    return y_TD, served_TK, (arrived.fill, *fills), unsent + arrived.unsent, way
