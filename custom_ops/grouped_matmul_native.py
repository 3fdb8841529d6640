"""Grouped matrix products by the compiled library, on CPU.

Every number is summed in f32, of f64 operands in f64, in order of the contracted dimension; 16-bit operands become f32
while they are packed for the cache, so no copy of them is ever made.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from custom_ops import native
from custom_ops.dtypes import wide


def forward(rows_ND, w_EDF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """out_NF = rows_ND @ w_EDF[group of row]."""
    return _rowwise(rows_ND, w_EDF, sizes_E, dtype, transposed=False)


def dlhs(dout_NF, w_EDF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """drows_ND = dout_NF @ w_EDF[group of row] transposed."""
    return _rowwise(dout_NF, w_EDF, sizes_E, dtype, transposed=True)


def drhs(rows_ND, dout_NF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """dw_EDF[e] = rows_ND[group e] transposed @ dout_NF[group e]."""
    shape = (sizes_E.shape[0], rows_ND.shape[1], dout_NF.shape[1])
    return _call("moejax_grouped_matmul_drhs", shape, dtype, rows_ND, dout_NF, sizes_E)


def _rowwise(lhs_NA, w_EDF, sizes_E, dtype, *, transposed: bool):
    shape = (lhs_NA.shape[0], w_EDF.shape[1 if transposed else 2])
    return _call("moejax_grouped_matmul", shape, dtype, lhs_NA, w_EDF, sizes_E, transposed=transposed)


def _call(name: str, shape: tuple[int, ...], dtype: DTypeLike, lhs, rhs, sizes_E, **attributes) -> jax.Array:
    if not native.computes_in(lhs.dtype):
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    # The library rounds to the operands' type, or leaves the sum as it is; other types are made of that.
    result = jax.ShapeDtypeStruct(shape, lhs.dtype if jnp.dtype(dtype) == lhs.dtype else wide(lhs.dtype))
    return native.call(name, result, lhs, rhs, sizes_E.astype(jnp.int32), **attributes).astype(dtype)
