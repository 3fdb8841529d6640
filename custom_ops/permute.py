"""permute copies token rows into the order of a plan, unpermute sums each token's rows again.

Shapes: T tokens, K choices per token, N rows, D width. Each op is the other's transpose; both directions
of both are gathers through the plan's two tables, so no floating-point number is ever scattered and sums
have a fixed order.
"""

import jax
import jax.numpy as jnp

from custom_ops import native
from custom_ops.arguments import RULES, local
from custom_ops.checks import checked, instance_of, require
from custom_ops.dtypes import is_whole_bytes, wide
from custom_ops.plan import DispatchPlan
from custom_ops.varying import vary_alike, vary_like

_checked = checked(RULES | {"plan": instance_of(DispatchPlan, "a DispatchPlan, as make_plan returns it")})


@_checked
def permute(x_TD: jax.Array, plan: DispatchPlan, weights_TK: jax.Array | None = None) -> jax.Array:
    """rows_ND: row n is the row of its token, times the weight of its choice if weights are given.

    Empty rows are exactly 0, whatever is in x. The product is formed in at least f32; the result has the
    dtype of x, which may be an integer type when there are no weights. Both tables of the plan must be those of
    `make_plan`: of rows that one names and the other does not know, nothing is promised.

    Raises:
      ValueError: ranks, dtypes or sizes that do not belong together.
    """
    _require_plan(plan)
    T, K = plan.position_TK.shape
    require(x_TD.shape[0] == T, "x_TD", x_TD, f"must have {T} tokens as in the plan")
    if weights_TK is not None:
        _require_weights(weights_TK, x_TD, "x_TD", (T, K))
        x_TD, weights_TK, plan = _vary_alike(x_TD, weights_TK, plan)
        return _permute_weighted(x_TD, weights_TK, plan)
    x_TD, _, plan = _vary_alike(x_TD, None, plan)
    if not jnp.issubdtype(x_TD.dtype, jnp.inexact):
        return _move_tokens(x_TD, plan)
    return _permute(x_TD, plan)


@_checked
def unpermute(rows_ND: jax.Array, plan: DispatchPlan, weights_TK: jax.Array | None = None) -> jax.Array:
    """y_TD: the sum of each token's rows, each times the weight of its choice if weights are given.

    Empty rows are never read, so what is in them reaches neither the result nor a gradient. Sums are
    formed in at least f32; the result has the dtype of the rows.

    Raises:
      ValueError: ranks, dtypes or sizes that do not belong together.
    """
    _require_plan(plan)
    N = plan.choice_N.shape[0]
    require(rows_ND.shape[0] == N, "rows_ND", rows_ND, f"must have {N} rows as in the plan")
    if weights_TK is not None:
        _require_weights(weights_TK, rows_ND, "rows_ND", plan.position_TK.shape)
        rows_ND, weights_TK, plan = _vary_alike(rows_ND, weights_TK, plan)
        return _unpermute_weighted(rows_ND, weights_TK, plan)
    rows_ND, _, plan = _vary_alike(rows_ND, None, plan)
    return _unpermute(rows_ND, plan)


def _require_plan(plan: DispatchPlan) -> None:
    local("[T, K]", jnp.integer)("plan.position_TK", plan.position_TK)
    local("[N]", jnp.integer)("plan.choice_N", plan.choice_N)
    K = plan.position_TK.shape[1]
    require(
        plan.num_choices == K, "plan.num_choices", plan.num_choices, f"must be {K} as in plan.position_TK"
    )


def _require_weights(weights_TK, payload, name, shape) -> None:
    require(weights_TK.shape == shape, "weights_TK", weights_TK, f"must have shape {shape} as in the plan")
    is_floating = jnp.issubdtype(payload.dtype, jnp.floating)
    require(is_floating, name, payload, "must be floating where there are weights")


def _vary_alike(payload, weights_TK, plan: DispatchPlan):
    leaves, treedef = jax.tree.flatten((payload, weights_TK, plan))
    return jax.tree.unflatten(treedef, vary_alike(*leaves))


# The moves: by the compiled libraries on CPU and CUDA, elsewhere as gathers of XLA


def _move_tokens(x_TD, plan: DispatchPlan, weights_TK=None):
    """Each token's row to its places, times the weights if there are any."""

    def library(x_TD, plan, weights_TK):
        rows = jax.ShapeDtypeStruct((plan.choice_N.shape[0], x_TD.shape[1]), x_TD.dtype)
        # Without weights any dtype is moved, also one that jax does not promote.
        weights = _or_none(weights_TK, jnp.float32 if weights_TK is None else x_TD.dtype)
        return native.call("moejax_permute", rows, x_TD, plan.position_TK, plan.choice_N, weights)

    can = is_whole_bytes(x_TD.dtype) if weights_TK is None else native.computes_in(x_TD.dtype)
    return native.by_platform(
        (x_TD, plan, weights_TK),
        cpu=library if can else None,
        cuda=library if can else None,
        otherwise=_gather_tokens,
    )


def _sum_rows(rows_ND, plan: DispatchPlan, weights_TK=None):
    """The sum of each token's rows, times the weights if there are any."""

    def library(rows_ND, plan, weights_TK):
        y = jax.ShapeDtypeStruct((plan.position_TK.shape[0], rows_ND.shape[1]), rows_ND.dtype)
        weights = _or_none(weights_TK, rows_ND.dtype)
        return native.call("moejax_unpermute", y, rows_ND, plan.position_TK, weights)

    return native.by_platform(
        (rows_ND, plan, weights_TK),
        cpu=library if native.computes_in(rows_ND.dtype) else None,
        cuda=library if native.computes_in(rows_ND.dtype) else None,
        otherwise=_gather_sum,
    )


def _move_and_dot(rows_ND, dy_TD, weights_TK, plan: DispatchPlan):
    """Both gradients of a weighted sum of rows in one pass: drows_ND, and <row, dy> for every choice."""

    def library(rows_ND, dy_TD, weights_TK, plan):
        weights = _or_none(weights_TK, rows_ND.dtype)
        results = (
            jax.ShapeDtypeStruct(rows_ND.shape, rows_ND.dtype),
            jax.ShapeDtypeStruct(weights.shape, weights.dtype),
        )
        operands = (rows_ND, dy_TD, plan.position_TK, plan.choice_N, weights)
        drows_ND, dots_TK = native.call("moejax_unpermute_backward", results, *operands)
        return drows_ND, dots_TK.astype(weights_TK.dtype)

    return native.by_platform(
        (rows_ND, dy_TD, weights_TK, plan),
        cpu=library if native.computes_in(rows_ND.dtype) else None,
        cuda=library if native.computes_in(rows_ND.dtype) else None,
        otherwise=_gather_and_dot,
    )


def _or_none(weights_TK, dtype) -> jax.Array:
    """The weights as the libraries take them, in what products are formed in: no elements for none."""
    return jnp.zeros((0, 0), wide(dtype)) if weights_TK is None else weights_TK.astype(wide(dtype))


def _take_rows(table: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of a table by index; -1 gives some row, which the caller masks."""
    if table.shape[0] == 0:
        return vary_like(jnp.zeros(index.shape + table.shape[1:], table.dtype), table, index)
    return table.at[jnp.maximum(index, 0)].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _gather_tokens(x_TD, plan: DispatchPlan, weights_TK=None):
    rows_ND = _take_rows(x_TD, plan.token_N)
    if weights_TK is not None:
        weights_N = _take_rows(weights_TK.reshape(-1), plan.choice_N)
        rows_ND = rows_ND.astype(wide(x_TD.dtype)) * weights_N.astype(wide(x_TD.dtype))[:, None]
    return jnp.where((plan.choice_N >= 0)[:, None], rows_ND, 0).astype(x_TD.dtype)


def _gather_sum(rows_ND, plan: DispatchPlan, weights_TK=None):
    """One gather per choice, fused into a running sum: a [T, K, D] array never exists."""
    sums = wide(rows_ND.dtype)
    sum_TD = jnp.zeros((plan.position_TK.shape[0], rows_ND.shape[1]), sums)
    for k in range(plan.num_choices):
        position_T = plan.position_TK[:, k]
        term_TD = _take_rows(rows_ND, position_T).astype(sums)
        if weights_TK is not None:
            term_TD = term_TD * weights_TK[:, k, None].astype(sums)
        sum_TD = sum_TD + jnp.where((position_T >= 0)[:, None], term_TD, 0)
    return sum_TD.astype(rows_ND.dtype)


def _gather_dot(rows_ND, y_TD, plan: DispatchPlan, dtype):
    """For every choice the inner product of its row with its token's row, [T, K]; 0 without a row."""
    sums = wide(rows_ND.dtype)
    y_TD = y_TD.astype(sums)
    dots = []
    for k in range(plan.num_choices):
        position_T = plan.position_TK[:, k]
        dot_T = jnp.sum(_take_rows(rows_ND, position_T).astype(sums) * y_TD, axis=-1)
        dots.append(jnp.where(position_T >= 0, dot_T, 0))
    return jnp.stack(dots, axis=-1).astype(dtype)


def _gather_and_dot(rows_ND, dy_TD, weights_TK, plan: DispatchPlan):
    drows_ND = _gather_tokens(dy_TD, plan, weights_TK)
    return drows_ND, _gather_dot(rows_ND, dy_TD, plan, weights_TK.dtype)


# The rules: each backward calls such ops again, so that it can be differentiated in turn.


@jax.custom_vjp
def _permute(x_TD, plan):
    return _move_tokens(x_TD, plan)


@jax.custom_vjp
def _unpermute(rows_ND, plan):
    return _sum_rows(rows_ND, plan)


@jax.custom_vjp
def _permute_weighted(x_TD, weights_TK, plan):
    return _move_tokens(x_TD, plan, weights_TK)


@jax.custom_vjp
def _unpermute_weighted(rows_ND, weights_TK, plan):
    return _sum_rows(rows_ND, plan, weights_TK)


@jax.custom_vjp
def _row_dot(rows_ND, y_TD, weights_TK, plan):
    """The weights' gradient; `weights_TK` only lends its dtype."""
    return _gather_dot(rows_ND, y_TD, plan, weights_TK.dtype)


@jax.custom_vjp
def _unpermute_backward(rows_ND, dy_TD, weights_TK, plan):
    """Gradients of a weighted `unpermute`: of its rows and of its weights."""
    return _move_and_dot(rows_ND, dy_TD, weights_TK, plan)


def _permute_fwd(x_TD, plan):
    return _permute(x_TD, plan), plan


def _permute_bwd(plan, drows_ND):
    return _unpermute(drows_ND, plan), None


def _unpermute_fwd(rows_ND, plan):
    return _unpermute(rows_ND, plan), plan


def _unpermute_bwd(plan, dy_TD):
    return _permute(dy_TD, plan), None


def _permute_weighted_fwd(x_TD, weights_TK, plan):
    return _permute_weighted(x_TD, weights_TK, plan), (x_TD, weights_TK, plan)


def _permute_weighted_bwd(saved, drows_ND):
    x_TD, weights_TK, plan = saved
    dx_TD = _unpermute_weighted(drows_ND, weights_TK, plan)
    return dx_TD, _row_dot(drows_ND, x_TD, weights_TK, plan), None


def _unpermute_weighted_fwd(rows_ND, weights_TK, plan):
    return _unpermute_weighted(rows_ND, weights_TK, plan), (rows_ND, weights_TK, plan)


def _unpermute_weighted_bwd(saved, dy_TD):
    rows_ND, weights_TK, plan = saved
    return *_unpermute_backward(rows_ND, dy_TD, weights_TK, plan), None


def _unpermute_backward_fwd(rows_ND, dy_TD, weights_TK, plan):
    return _unpermute_backward(rows_ND, dy_TD, weights_TK, plan), (rows_ND, dy_TD, weights_TK, plan)


def _unpermute_backward_bwd(saved, cotangents):
    rows_ND, dy_TD, weights_TK, plan = saved
    g_ND, g_TK = cotangents
    ddy_TD = _unpermute_weighted(g_ND, weights_TK, plan) + _unpermute_weighted(rows_ND, g_TK, plan)
    return _permute_weighted(dy_TD, g_TK, plan), ddy_TD, _row_dot(g_ND, dy_TD, weights_TK, plan), None


def _row_dot_fwd(rows_ND, y_TD, weights_TK, plan):
    return _row_dot(rows_ND, y_TD, weights_TK, plan), (rows_ND, y_TD, plan)


def _row_dot_bwd(saved, ddot_TK):
    rows_ND, y_TD, plan = saved
    drows_ND = _permute_weighted(y_TD, ddot_TK, plan)
    return drows_ND, _unpermute_weighted(rows_ND, ddot_TK, plan), jnp.zeros_like(ddot_TK), None


_permute.defvjp(_permute_fwd, _permute_bwd)
_unpermute.defvjp(_unpermute_fwd, _unpermute_bwd)
_permute_weighted.defvjp(_permute_weighted_fwd, _permute_weighted_bwd)
_unpermute_weighted.defvjp(_unpermute_weighted_fwd, _unpermute_weighted_bwd)
_unpermute_backward.defvjp(_unpermute_backward_fwd, _unpermute_backward_bwd)
_row_dot.defvjp(_row_dot_fwd, _row_dot_bwd)
