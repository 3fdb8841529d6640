"""Grouped matrix products as a loop over groups, each covered by windows of its rows.

Shapes: N rows, E groups, D and F widths, R rows of one window. A group takes as many of the largest
windows as fit, and one window of the smallest size that holds the rest, with the rows outside the group
masked. So the work follows the rows that are there: neither more groups nor a longer tail cost products.
Trip counts are data; the program has one loop over groups, whatever E.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from custom_ops.dtypes import wide
from custom_ops.groups import group_bounds
from custom_ops.varying import vary_like

# Window sizes in rows: steps of at most two waste few masked rows, each one is a loop more to compile.
WINDOWS = (32, 64, 128, 192, 320, 512)


def forward(rows_ND, w_EDF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """out_NF = rows_ND @ w_EDF[group of row]."""
    return _rowwise(rows_ND, w_EDF, sizes_E, dtype, w_axis=1)


def dlhs(dout_NF, w_EDF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """drows_ND = dout_NF @ w_EDF[group of row] transposed, without ever transposing w in memory."""
    return _rowwise(dout_NF, w_EDF, sizes_E, dtype, w_axis=2)


def _rowwise(lhs_NA, w_EDF, sizes_E, dtype, *, w_axis: int):
    """out_NB: rows times the matrix of their group, contracted over axis `w_axis` of w_EDF."""
    N, A = lhs_NA.shape
    B = w_EDF.shape[3 - w_axis]
    sums = wide(lhs_NA.dtype)
    out_NB = vary_like(jnp.zeros((N, B), dtype), lhs_NA, w_EDF, sizes_E)
    if 0 in (N, w_EDF.shape[0]):
        return out_NB
    bounds = group_bounds(sizes_E, N)

    def group(e, out_NB):
        w_DF = lax.dynamic_index_in_dim(w_EDF, e, 0, keepdims=False)

        def window(R, start, mask_R, out_NB):
            lhs_RA = lax.dynamic_slice(lhs_NA, (start, jnp.int32(0)), (R, A))
            contract = (((1,), (w_axis - 1,)), ((), ()))
            out_RB = lax.dot_general(lhs_RA, w_DF, contract, preferred_element_type=sums).astype(dtype)
            if mask_R is not None:
                there_RB = lax.dynamic_slice(out_NB, (start, jnp.int32(0)), (R, B))
                out_RB = jnp.where(mask_R[:, None], out_RB, there_RB)
            return lax.dynamic_update_slice(out_NB, out_RB, (start, jnp.int32(0)))

        return _cover(bounds[e], bounds[e + 1], N, WINDOWS, window, out_NB)

    return lax.fori_loop(0, w_EDF.shape[0], group, out_NB)


def drhs(rows_ND, dout_NF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """dw_EDF[e] = rows_ND[group e] transposed @ dout_NF[group e]."""
    (N, D), F, E = rows_ND.shape, dout_NF.shape[1], sizes_E.shape[0]
    sums = wide(rows_ND.dtype)
    dw_EDF = vary_like(jnp.zeros((E, D, F), sums), rows_ND, dout_NF, sizes_E)
    if 0 in (N, E):
        return dw_EDF.astype(dtype)
    bounds = group_bounds(sizes_E, N)

    def group(e, dw_EDF):
        def window(R, start, mask_R, dw_EDF):
            rows_RD = lax.dynamic_slice(rows_ND, (start, jnp.int32(0)), (R, D))
            dout_RF = lax.dynamic_slice(dout_NF, (start, jnp.int32(0)), (R, F))
            if mask_R is not None:
                # Both sides: 0 times a NaN of a foreign row would be NaN.
                rows_RD = jnp.where(mask_R[:, None], rows_RD, 0)
                dout_RF = jnp.where(mask_R[:, None], dout_RF, 0)
            contract = (((0,), (0,)), ((), ()))
            sum_DF = lax.dot_general(rows_RD, dout_RF, contract, preferred_element_type=sums)
            if mask_R is None:
                sum_DF = sum_DF + lax.dynamic_index_in_dim(dw_EDF, e, 0, keepdims=False)
            # The masked window comes first and finds zeros: it need not read them.
            return lax.dynamic_update_index_in_dim(dw_EDF, sum_DF, e, 0)

        return _cover(bounds[e], bounds[e + 1], N, WINDOWS, window, dw_EDF)

    return lax.fori_loop(0, E, group, dw_EDF).astype(dtype)


def _cover(
    start: jax.Array, end: jax.Array, N: int, sizes: Sequence[int], window: Callable, carry: jax.Array
) -> jax.Array:
    """Fold `carry = window(R, first row, mask_R or None, carry)` over windows that cover rows start to end.

    At most one window is masked; it comes first.
    """
    sizes = [R for R in sizes if R < N] or [N]
    largest = sizes[-1]
    full = (end - start) // largest
    whole_end = start + full * largest
    rest = end - whole_end
    smaller = 0
    for R in sizes:

        def turn(i, carry, R=R):
            # Without the turn's number in it, XLA would move the product out of the loop and always form it.
            # A window at the end of the buffer begins earlier; the mask is by row, so it stays right.
            first = jnp.minimum(whole_end + i * R, N - R)
            row_R = first + lax.iota(jnp.int32, R)
            return window(R, first, (row_R >= whole_end) & (row_R < end), carry)

        # A loop of at most one turn, not a `cond`: XLA:CPU copies what passes through a conditional.
        fits = (rest > smaller) & (rest <= R)
        carry = lax.fori_loop(0, fits.astype(jnp.int32), turn, carry)
        smaller = R
    return lax.fori_loop(0, full, lambda i, c: window(largest, start + i * largest, None, c), carry)
