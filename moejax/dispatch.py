"""Dispatch as a recursion: the same step once per level, the experts at the innermost one.

    plan -> permute -> [exchange] -> inner level -> [exchange back] -> unpermute

Shapes: T tokens on this device, D model width, K experts per token, N rows received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from custom_ops import DispatchPlan, make_plan
from moejax.exchange import Exchange

# (x_TD, plan, weights_TK) -> y_TD: each token's weighted sum over the experts of this device.
ExpertsFn = Callable[[jax.Array, DispatchPlan, jax.Array], jax.Array]


def dispatch(
    x_TD: jax.Array,
    ids_TK: jax.Array,
    weights_TK: jax.Array,
    *,
    levels: Sequence[Exchange],
    experts: ExpertsFn,
    experts_per_device: int,
) -> tuple[jax.Array, jax.Array]:
    """Carry each token to the experts it chose and bring back the weighted sum of their outputs.

    Args:
      ids_TK: chosen experts, -1 for none; at each level counted within what lies below it.
      levels: wire levels still to go through, outermost first; none without expert parallelism.

    Returns:
      y_TD, zero for tokens that chose nothing, and served_TK, the choices that were carried out.
    """
    if not levels:
        plan = make_plan(ids_TK, experts_per_device)
        return experts(x_TD, plan, weights_TK), plan.served_TK
    exchange, *inner = levels
    rows_ND, ids_NK, weights_NK, plan = exchange.dispatch(x_TD, ids_TK, weights_TK)
    # The level below has room for every row that could arrive, so what is served is decided by this level's buckets.
    y_ND, _ = dispatch(
        rows_ND, ids_NK, weights_NK, levels=inner, experts=experts, experts_per_device=experts_per_device
    )
    return exchange.combine(y_ND, plan), plan.served_TK
