"""Dispatch as a recursion: the same step once per level, the experts at the innermost one.

    plan -> permute -> [exchange] -> inner level -> [exchange back] -> unpermute

Shapes: T tokens on this device, D model width, K experts per token, N rows received.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from custom_ops import DispatchPlan, make_plan
from moejax.levels import Levels

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


def dispatch(
    x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array, *, levels: Levels, experts: ExpertsFn
) -> Delivery:
    """Carry each token to the experts it chose and bring back the weighted sum of their outputs.

    Args:
      ids_TK: chosen experts, -1 for none; at each level counted within what lies below it.
      levels: those still to go through; without expert parallelism there is only the experts' own.
    """
    if not levels.exchanges:
        plan = make_plan(ids_TK, levels.experts_per_device)
        if levels.expert_rows is not None:
            plan = plan.at_most(levels.expert_rows)
        fill = jnp.sum(plan.group_sizes_P) / max(plan.choice_N.shape[0], 1)
        fills = (fill.astype(jnp.float32),)
        return Delivery(experts(x_TD, plan, weights_TK), plan.served_TK, fills, jnp.int32(0))
    exchange = levels.exchanges[0]
    rows_ND, ids_NK, weights_NK, fill, unsent, ticket = exchange.dispatch(x_TD, ids_TK, weights_TK)
    inner = dispatch(rows_ND, ids_NK, weights_NK, levels=levels.below(), experts=experts)
    y_TD, served_TK = exchange.combine(inner.y_TD, inner.served_TK, ticket)
    return Delivery(y_TD, served_TK, (fill, *inner.fills), unsent + inner.unsent)
