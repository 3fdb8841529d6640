"""Grouped matrix products by the compiled library, on CPU.

f32 and f64 are summed as they are, in order of the contracted dimension; 16-bit operands become f32 first.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from custom_ops import native


def forward(rows_ND, w_EDF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """out_NF = rows_ND @ w_EDF[group of row]."""
    return _rowwise(rows_ND, w_EDF, sizes_E, dtype, transposed=False)


def dlhs(dout_NF, w_EDF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """drows_ND = dout_NF @ w_EDF[group of row] transposed."""
    return _rowwise(dout_NF, w_EDF, sizes_E, dtype, transposed=True)


def drhs(rows_ND, dout_NF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """dw_EDF[e] = rows_ND[group e] transposed @ dout_NF[group e]."""
    rows_ND, dout_NF = _wide(rows_ND), _wide(dout_NF)
    shape = (sizes_E.shape[0], rows_ND.shape[1], dout_NF.shape[1])
    dw = jax.ShapeDtypeStruct(shape, rows_ND.dtype)
    return native.call("moejax_grouped_matmul_drhs", dw, rows_ND, dout_NF, sizes_E.astype(jnp.int32)).astype(
        dtype
    )


def _rowwise(lhs_NA, w_EDF, sizes_E, dtype, *, transposed: bool):
    lhs_NA, w_EDF = _wide(lhs_NA), _wide(w_EDF)
    out = jax.ShapeDtypeStruct((lhs_NA.shape[0], w_EDF.shape[1 if transposed else 2]), lhs_NA.dtype)
    return native.call(
        "moejax_grouped_matmul", out, lhs_NA, w_EDF, sizes_E.astype(jnp.int32), transposed=transposed
    ).astype(dtype)


def _wide(array: jax.Array) -> jax.Array:
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))
