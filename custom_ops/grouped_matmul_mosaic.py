"""Grouped matrix products by jax's own Mosaic kernels, for Hopper GPUs, 16-bit types and aligned widths.

Shapes: N rows, E groups, D and F widths.

The kernels use what only Hopper has (warpgroup products fed by the tensor memory accelerator). They leave the tail
unwritten, and for the weights' gradient they read whole blocks of rows and cancel those of neighbours by a product
with 0, which a NaN would survive. `grouped_matmul_guard` keeps both from doing harm: a number that is not finite, in a
block that its group shares with another, makes the whole gradient of its own group NaN, and that of no other.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata
from jax.typing import DTypeLike

from custom_ops.checks import require
from custom_ops.grouped_matmul_guard import clean_shared_blocks, spoil_groups, zero_tail
from custom_ops.groups import group_bounds
from custom_ops.target import target
from custom_ops.varying import vary_like

# Widths must be multiples of it: a block of a sum is 64 wide, a tile of the weights' gradient 128 by 128.
ALIGNMENT = 128
_TILES: dict[str, Any] = {"block_m": 128, "block_n": 128, "block_k": 64, "max_concurrent_steps": 4}
# Tiles of columns that follow each other before the next tile of rows: their rows stay in the cache.
_COLUMNS_TOGETHER = 8
# FLOP/s at which XLA's scheduler is told that products of rows run, a little below what grouped products reach on an
# H100 or H200. By itself it counts 10 us for any kernel, and so never finds enough to hide an exchange between nodes
# under, which delays others.
_SCHEDULED_FLOPS = 2e14
# The kernels' search for a tile's group is unrolled, for every tile.
MAX_GROUPS = 256


def forward(rows_ND, w_EDF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """out_NF = rows_ND @ w_EDF[group of row]."""
    return _rowwise(rows_ND, w_EDF, sizes_E, dtype, transpose=False)


def dlhs(dout_NF, w_EDF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """drows_ND = dout_NF @ w_EDF[group of row] transposed, without ever transposing w in memory."""
    return _rowwise(dout_NF, w_EDF, sizes_E, dtype, transpose=True)


def _rowwise(lhs, w_EDF, sizes_E, dtype, *, transpose: bool) -> jax.Array:
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot

    E, D, F = w_EDF.shape
    _require_fit(lhs.dtype, D, F, E, dtype)
    sizes_E = jnp.diff(group_bounds(sizes_E, lhs.shape[0]))
    nanoseconds = round(1e9 * 2 * lhs.shape[0] * D * F / _SCHEDULED_FLOPS)
    with set_xla_metadata(latency_metadata=str(nanoseconds)):
        out = ragged_dot(
            lhs,
            w_EDF,
            group_sizes=sizes_E,
            transpose_rhs=transpose,
            grid_block_n=min(_COLUMNS_TOGETHER, (D if transpose else F) // _TILES["block_n"]),
            **_TILES,
        )
    return zero_tail(vary_like(out, lhs, w_EDF, sizes_E), sizes_E)


def drhs(rows_ND, dout_NF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """dw_EDF[e] = rows_ND[group e] transposed @ dout_NF[group e]."""
    from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

    (N, D), F, E = rows_ND.shape, dout_NF.shape[1], sizes_E.shape[0]
    _require_fit(rows_ND.dtype, D, F, E, dtype)
    sizes_E = jnp.diff(group_bounds(sizes_E, N))
    block = _TILES["block_k"]
    rows_ND, bad_rows_E = clean_shared_blocks(zero_tail(rows_ND, sizes_E), sizes_E, block)
    dout_NF, bad_dout_E = clean_shared_blocks(zero_tail(dout_NF, sizes_E), sizes_E, block)
    dw_EDF = transposed_ragged_dot(
        rows_ND,
        dout_NF,
        group_sizes=sizes_E,
        grid_block_n=min(_COLUMNS_TOGETHER, F // _TILES["block_n"]),
        **_TILES,
    )
    return spoil_groups(vary_like(dw_EDF, rows_ND, dout_NF, sizes_E), bad_rows_E | bad_dout_E)


def misfit(dtype: DTypeLike, D: int, F: int, E: int, result_dtype: DTypeLike | None = None) -> str | None:
    """Why these kernels cannot form a product for the target, None if they can."""
    dtype = jnp.dtype(dtype)
    if not target().is_hopper:
        return f"{target().kind} is no Hopper GPU"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"{dtype} is not a 16-bit type"
    if result_dtype is not None and jnp.dtype(result_dtype) != dtype:
        return f"the result is {jnp.dtype(result_dtype)}, the operands are {dtype}"
    if D % ALIGNMENT or F % ALIGNMENT:
        return f"widths {D} and {F} are not multiples of {ALIGNMENT}"
    if E > MAX_GROUPS:
        return f"{E} groups are more than {MAX_GROUPS}"
    return None


def _require_fit(dtype, D: int, F: int, E: int, result_dtype) -> None:
    reason = misfit(dtype, D, F, E, result_dtype)
    require(reason is None, "implementation", "mosaic", f"must be one that can form this product: {reason}")
