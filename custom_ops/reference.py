"""The specification of every op, slow and obvious: the oracle of the tests, and what runs as a last resort.

Shapes: T tokens, K choices per token, P destinations, N rows, B rows of one bucket, D and F widths, E groups.
Plain jnp throughout, so that differentiating these functions gives the oracle of the gradients.
"""

import jax
import jax.numpy as jnp
from jax import lax

from custom_ops.dtypes import wide
from custom_ops.plan import DispatchPlan


def make_plan(
    dest_TK: jax.Array, num_destinations: int, bucket_rows: int | None = None, *, unique: bool = False
) -> DispatchPlan:
    """See `custom_ops.make_plan`."""
    T, K = dest_TK.shape
    P, M = num_destinations, T * K
    valid_TK = (dest_TK >= 0) & (dest_TK < P)
    repeats_TK = jnp.zeros((T, K), bool)
    if unique:
        for k in range(K):
            for earlier in range(k):
                repeats_TK = repeats_TK.at[:, k].max(dest_TK[:, k] == dest_TK[:, earlier])
    has_row_MP = (valid_TK & ~repeats_TK).reshape(M, 1) & (dest_TK.reshape(M, 1) == jnp.arange(P)[None, :])
    has_row_M = has_row_MP.any(axis=1)
    destination_M = jnp.argmax(has_row_MP, axis=1)
    rank_M = jnp.sum(jnp.where(has_row_MP, jnp.cumsum(has_row_MP, axis=0) - 1, 0), axis=1)
    sizes_P = has_row_MP.sum(axis=0)
    if bucket_rows is None:
        N, start_P = M, jnp.cumsum(sizes_P) - sizes_P
    else:
        N, start_P = P * bucket_rows, jnp.arange(P) * bucket_rows
        has_row_M &= rank_M < bucket_rows
        sizes_P = jnp.minimum(sizes_P, bucket_rows)
    position_M = jnp.where(has_row_M, start_P[destination_M] + rank_M, -1)
    choice_N = jnp.full((N,), -1).at[jnp.where(has_row_M, position_M, N)].set(jnp.arange(M), mode="drop")
    position_TK = position_M.reshape(T, K)
    served_TK = position_TK >= 0
    if unique:
        for k in range(K):
            for earlier in range(k):
                same_T = valid_TK[:, k] & (dest_TK[:, k] == dest_TK[:, earlier])
                served_TK = served_TK.at[:, k].max(same_T & served_TK[:, earlier])
    num_invalid = jnp.sum(~valid_TK & (dest_TK != -1))
    return DispatchPlan(
        position_TK=position_TK.astype(jnp.int32),
        choice_N=choice_N.astype(jnp.int32),
        group_sizes_P=sizes_P.astype(jnp.int32),
        served_TK=served_TK,
        num_invalid=num_invalid.astype(jnp.int32),
        num_choices=K,
    )


def permute(x_TD: jax.Array, plan: DispatchPlan, weights_TK: jax.Array | None = None) -> jax.Array:
    """See `custom_ops.permute`."""
    present_N = plan.choice_N >= 0
    if x_TD.shape[0] == 0:
        return jnp.zeros((present_N.shape[0], x_TD.shape[1]), x_TD.dtype)
    # Masked before the product too, so that plain differentiation never forms 0 * NaN.
    rows_ND = jnp.where(present_N[:, None], x_TD[jnp.maximum(plan.token_N, 0)], 0)
    if weights_TK is not None:
        weights_N = jnp.where(present_N, weights_TK.reshape(-1)[jnp.maximum(plan.choice_N, 0)], 0)
        rows_ND = (rows_ND.astype(wide(x_TD.dtype)) * weights_N.astype(wide(x_TD.dtype))[:, None]).astype(
            x_TD.dtype
        )
    return rows_ND


def unpermute(rows_ND: jax.Array, plan: DispatchPlan, weights_TK: jax.Array | None = None) -> jax.Array:
    """See `custom_ops.unpermute`."""
    T, _ = plan.position_TK.shape
    if T == 0:
        return jnp.zeros((0, rows_ND.shape[1]), rows_ND.dtype)
    present_N = plan.choice_N >= 0
    terms_ND = jnp.where(present_N[:, None], rows_ND, 0).astype(wide(rows_ND.dtype))
    if weights_TK is not None:
        weights_N = jnp.where(present_N, weights_TK.reshape(-1)[jnp.maximum(plan.choice_N, 0)], 0)
        terms_ND = terms_ND * weights_N.astype(terms_ND.dtype)[:, None]
    y_TD = jnp.zeros((T, rows_ND.shape[1]), terms_ND.dtype)
    return y_TD.at[jnp.where(present_N, plan.token_N, T)].add(terms_ND, mode="drop").astype(rows_ND.dtype)


def grouped_matmul(rows_ND, w_EDF, group_sizes_E, dtype=None) -> jax.Array:
    """See `custom_ops.grouped_matmul`."""
    sums = wide(rows_ND.dtype)

    def product(w_DF_and_mask_N):
        w_DF, mask_N = w_DF_and_mask_N
        return jnp.where(mask_N[:, None], rows_ND, 0).astype(sums) @ w_DF.astype(sums)

    masks_EN = _group_masks(group_sizes_E, rows_ND.shape[0])
    return lax.map(product, (w_EDF, masks_EN)).sum(axis=0).astype(dtype or rows_ND.dtype)


def grouped_matmul_dlhs(dout_NF, w_EDF, group_sizes_E, dtype=None) -> jax.Array:
    """See `custom_ops.grouped_matmul_dlhs`."""
    return grouped_matmul(dout_NF, w_EDF.transpose(0, 2, 1), group_sizes_E, dtype)


def grouped_matmul_drhs(rows_ND, dout_NF, group_sizes_E, dtype=None) -> jax.Array:
    """See `custom_ops.grouped_matmul_drhs`."""
    sums = wide(rows_ND.dtype)

    def product(mask_N):
        lhs_ND = jnp.where(mask_N[:, None], rows_ND, 0).astype(sums)
        return lhs_ND.T @ jnp.where(mask_N[:, None], dout_NF, 0).astype(sums)

    return lax.map(product, _group_masks(group_sizes_E, rows_ND.shape[0])).astype(dtype or rows_ND.dtype)


def swiglu(hidden_N2F) -> jax.Array:
    """See `custom_ops.swiglu`."""
    gate_NF, up_NF = jnp.split(hidden_N2F, 2, axis=-1)
    return jax.nn.silu(gate_NF) * up_NF


def swiglu_backward(hidden_N2F, da_NF, weight_N) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `custom_ops.swiglu_backward`."""
    a_NF, vjp = jax.vjp(swiglu, hidden_N2F)
    d_weight_N = jnp.sum(da_NF * a_NF.astype(da_NF.dtype), axis=-1)
    (dh_N2F,) = vjp((da_NF * weight_N[:, None]).astype(a_NF.dtype))
    return (a_NF * weight_N[:, None]).astype(a_NF.dtype), dh_N2F, d_weight_N


def _group_masks(group_sizes_E, N: int) -> jax.Array:
    """bool [E, N]: the row belongs to the group."""
    group_sizes_E = jnp.maximum(group_sizes_E, 0)
    ends_E = jnp.cumsum(group_sizes_E)
    row_N = jnp.arange(N)[None, :]
    return (row_N >= (ends_E - group_sizes_E)[:, None]) & (row_N < ends_E[:, None])
