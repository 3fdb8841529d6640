"""MoE as pure functions on arrays, usable from any JAX code, also under the caller's own `shard_map`.

Shapes: T tokens on this device, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from custom_ops import DispatchPlan as DispatchPlan
from custom_ops import grouped_matmul as grouped_matmul
from custom_ops import make_plan as make_plan
from custom_ops import permute as permute
from custom_ops import unpermute as unpermute
from custom_ops.checks import BadArgument, one_of, require
from moejax.arguments import POSITIVE_OR_INFINITE, checked, experts_function
from moejax.delivery import Account as Account
from moejax.delivery import deliver as deliver
from moejax.dispatch import ExpertsFn
from moejax.levels import EXCHANGES
from moejax.routing import softmax_top_k


@checked()
def route(logits_TE: jax.Array, top_k: int, *, normalize: bool | None = None) -> tuple[jax.Array, jax.Array]:
    """Softmax top-k: ids_TK i32 and weights_TK f32, which with `normalize` (default: if K > 1) sum to one per token.

    Raises:
      ValueError: logits_TE are not [tokens, experts], or K is not between 1 and E.
    """
    num_experts = logits_TE.shape[1]
    rule = f"must be between 1 and the number of experts ({num_experts})"
    require(1 <= top_k <= num_experts, "top_k", top_k, rule)
    ids_TK, weights_TK, _ = softmax_top_k(logits_TE, top_k, normalize=normalize)
    return ids_TK, weights_TK


@checked()
def on_rows(fn: Callable[[jax.Array, jax.Array], jax.Array]) -> ExpertsFn:
    """Experts from a function of their sorted rows.

    `fn(rows_ND, group_sizes_E) -> rows_ND` gets the rows of expert 0, then those of expert 1, ...; rows past the sum
    of the sizes are zero and what it returns there is ignored.
    """

    def experts(x_TD, plan, weights_TK):
        return unpermute(fn(permute(x_TD, plan), plan.group_sizes_P), plan, weights_TK)

    return experts


@checked(experts=experts_function, exchange=one_of(EXCHANGES), capacity_factor=POSITIVE_OR_INFINITE)
def moe(
    x_TD: jax.Array,
    ids_TK: jax.Array,
    weights_TK: jax.Array,
    experts: ExpertsFn,
    *,
    num_experts: int,
    axis: str | Sequence[str] | None = None,
    exchange: str = "all_to_all",
    capacity_factor: float | None = None,
    chunks: int = 1,
) -> jax.Array:
    """y_t = sum_k weights[t, k] * expert_{ids[t, k]}(x_t), exact whatever the load; `deliver` has all options.

    Args:
      ids_TK: experts 0..num_experts - 1; -1 for none.
      experts: `(x_TD, plan, weights_TK) -> y_TD` over this device's experts; see `on_rows`.
      num_experts: E over all devices.
      axis: names of the mesh axes over which experts are split, outermost first, when called inside `shard_map`;
        None: all are here.
      exchange, capacity_factor, chunks: as in `MoE`.

    Raises:
      ValueError: as `deliver`.
    """
    if isinstance(axis, str):
        axis = (axis,)
    is_names = axis is None or (isinstance(axis, Sequence) and all(isinstance(name, str) for name in axis))
    is_names = is_names and len(set(axis or ())) == len(axis or ())
    require(is_names, "axis", axis, "must be the name of a mesh axis, several different ones, or None")
    try:
        y_TD, _ = deliver(
            x_TD,
            ids_TK,
            weights_TK,
            experts,
            num_experts=num_experts,
            axes=tuple(axis or ()),
            exchange=exchange,
            capacity_factor=capacity_factor,
            chunks=chunks,
        )
    except BadArgument as error:
        if error.argument == "axes":  # what this function calls otherwise
            raise BadArgument("axis", axis, error.rule) from None
        raise
    return y_TD
