"""What kernels that work on whole blocks of rows need around them, so that no row reaches another group's result.

Shapes: N rows, B their width, E groups, R rows of a block, C tiles of columns, D and F widths of a group's matrix.

A block of R rows may hold the end of one group and the beginning of the next, or the tail. A kernel that reads it whole
and cancels foreign rows by a product with 0 is right as long as they are finite. So here, in place where the arguments
are not used again: the tail becomes 0, in shared blocks what is not finite becomes 0 too, and the groups that such
numbers belong to are named, for their result to be made NaN afterwards. All are Triton kernels, which run in Pallas's
interpreter on CPU.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from custom_ops.grouped_matmul_triton import call_kernel
from custom_ops.groups import group_bounds

# Rows and columns of the tiles in which memory is gone through.
_ROWS, _COLUMNS, _WARPS = 128, 128, 8


def zero_tail(rows_NB: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The rows with 0 behind the last group."""
    N, B = rows_NB.shape
    if N == 0 or B == 0:
        return rows_NB
    return call_kernel(
        functools.partial(_zero_tail_kernel),
        grid=(pl.cdiv(N, _ROWS) * pl.cdiv(B, _COLUMNS),),
        results=((N, B), rows_NB.dtype),
        warps=_WARPS,
        aliases={1: 0},
    )(group_bounds(sizes_E, N)[-1:], rows_NB)


def _zero_tail_kernel(end_ref, rows_ref, out_ref):
    N, B = out_ref.shape
    columns = pl.cdiv(B, _COLUMNS)
    row = pl.program_id(0) // columns * _ROWS
    column = pl.program_id(0) % columns * _COLUMNS

    @pl.when(row + _ROWS > end_ref[0])
    def _():
        row_R, column_C = row + lax.iota(jnp.int32, _ROWS), column + lax.iota(jnp.int32, _COLUMNS)
        is_tail_R = (row_R >= end_ref[0]) & (row_R < N)
        plgpu.store(
            out_ref.at[pl.ds(row, _ROWS), pl.ds(column, _COLUMNS)],
            jnp.zeros((_ROWS, _COLUMNS), out_ref.dtype),
            mask=is_tail_R[:, None] & (column_C < B)[None, :],
        )


def clean_shared_blocks(rows_NB: jax.Array, sizes_E: jax.Array, R: int) -> tuple[jax.Array, jax.Array]:
    """The rows with 0 for what is not finite in blocks of several groups; bool [E]: the groups which that was of.

    Args:
      R: rows of a block, a power of two; blocks begin at its multiples.
    """
    (N, B), E = rows_NB.shape, sizes_E.shape[0]
    if 0 in (N, B, E):
        return rows_NB, sizes_E < 0
    ends_E = group_bounds(sizes_E, N)[1:]
    block_E = _shared_blocks(sizes_E, N, R)
    rows_NB, bad_ECR = call_kernel(
        functools.partial(_clean_kernel, R),
        grid=(E * pl.cdiv(B, _COLUMNS),),
        results=[((N, B), rows_NB.dtype), ((E, pl.cdiv(B, _COLUMNS), R), jnp.int32)],
        warps=_WARPS,
        aliases={1: 0},
    )(block_E, rows_NB)
    row_ER = block_E[:, None] * R + lax.broadcasted_iota(jnp.int32, (E, R), 1)
    group_ER = jnp.searchsorted(ends_E, row_ER, side="right", method="compare_all")
    is_bad_ERE = (bad_ECR.max(axis=1) > 0)[:, :, None] & (
        group_ER[:, :, None] == lax.broadcasted_iota(jnp.int32, (1, 1, E), 2)
    )
    return rows_NB, is_bad_ERE.any(axis=(0, 1))


def _shared_blocks(sizes_E: jax.Array, N: int, R: int) -> jax.Array:
    """Per group the block that it begins within, if it is the first one to do so there; else -1."""
    bounds = group_bounds(sizes_E, N)
    start_E = bounds[:-1]
    block_E = jnp.where((start_E % R != 0) & (start_E < bounds[1:]), start_E // R, -1)
    before_E = jnp.pad(lax.cummax(block_E), (1, 0), constant_values=-1)[:-1]
    return jnp.where(block_E > before_E, block_E, -1)


def _clean_kernel(R, block_ref, rows_ref, out_ref, bad_ref):
    N, B = out_ref.shape
    tiles = pl.cdiv(B, _COLUMNS)
    group, tile = pl.program_id(0) // tiles, pl.program_id(0) % tiles
    block = block_ref[group]
    row, column = jnp.maximum(block, 0) * R, tile * _COLUMNS
    is_row_R = (row + lax.iota(jnp.int32, R) < N) & (block >= 0)
    is_column_C = column + lax.iota(jnp.int32, _COLUMNS) < B
    there = is_row_R[:, None] & is_column_C[None, :]
    at = pl.ds(row, R), pl.ds(column, _COLUMNS)
    values = plgpu.load(rows_ref.at[at], mask=there, other=0).astype(jnp.float32)
    bad = ~(jnp.abs(values) < jnp.inf)
    plgpu.store(out_ref.at[at], jnp.zeros((R, _COLUMNS), out_ref.dtype), mask=there & bad)
    plgpu.store(bad_ref.at[group, tile, pl.ds(0, R)], jnp.max(bad.astype(jnp.int32), axis=1))


def spoil_groups(matrices_EDF: jax.Array, is_bad_E: jax.Array) -> jax.Array:
    """The matrices with NaN in those of the named groups."""
    E, D, F = matrices_EDF.shape
    if matrices_EDF.size == 0:
        return matrices_EDF
    return call_kernel(
        functools.partial(_spoil_kernel),
        grid=(E * pl.cdiv(D, _ROWS) * pl.cdiv(F, _COLUMNS),),
        results=((E, D, F), matrices_EDF.dtype),
        warps=_WARPS,
        aliases={1: 0},
    )(is_bad_E.astype(jnp.int32), matrices_EDF)


def _spoil_kernel(bad_ref, matrices_ref, out_ref):
    D, F = out_ref.shape[1:]
    tiles_D, tiles_F = pl.cdiv(D, _ROWS), pl.cdiv(F, _COLUMNS)
    group = pl.program_id(0) // (tiles_D * tiles_F)
    d = pl.program_id(0) // tiles_F % tiles_D * _ROWS
    f = pl.program_id(0) % tiles_F * _COLUMNS

    @pl.when(bad_ref[group] > 0)
    def _():
        is_d, is_f = d + lax.iota(jnp.int32, _ROWS) < D, f + lax.iota(jnp.int32, _COLUMNS) < F
        plgpu.store(
            out_ref.at[group, pl.ds(d, _ROWS), pl.ds(f, _COLUMNS)],
            jnp.full((_ROWS, _COLUMNS), jnp.nan, out_ref.dtype),
            mask=is_d[:, None] & is_f[None, :],
        )
