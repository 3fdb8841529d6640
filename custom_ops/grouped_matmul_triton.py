"""Grouped matrix products as Pallas kernels for Triton: any GPU, any sizes, any floating type.

Shapes: N rows, E groups, D and F widths; A is the width a row-wise product sums over, B the width it leaves; C
tiles of rows. On CPU the kernels run in Pallas's interpreter, which is slow and only there for tests.

The row-wise products give every group its own tiles of rows, from its first row on, so no tile has rows of two
groups and no row is in two tiles. How many tiles a group has is data; how many there can be in all is not:
with the tail as one more group, E + 1 groups of N rows have less than N / rows + E + 1 tiles.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from custom_ops.dtypes import wide
from custom_ops.groups import group_bounds
from custom_ops.target import target
from custom_ops.varying import result_like, vary_like


class Tiling(NamedTuple):
    """Rows and columns of a result's tile, width of one step of the sum, warps, and steps loaded ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Tiles of the 16-bit types fill the tensor cores and fit the shared memory of an A100 (160 KiB); true f32 and f64
# products run on the ordinary units, where the accumulator's registers are the limit.
_TILING_16_BIT = Tiling(rows=128, columns=128, depth=64, warps=8, stages=3)
_TILING_WIDE = Tiling(rows=64, columns=64, depth=16, warps=4, stages=3)
# Triton multiplies tiles of at least 16 by 16, of powers of two.
_SMALLEST = 16


def forward(rows_ND, w_EDF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """out_NF = rows_ND @ w_EDF[group of row]."""
    return _rowwise(rows_ND, w_EDF, sizes_E, dtype, w_axis=1)


def dlhs(dout_NF, w_EDF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """drows_ND = dout_NF @ w_EDF[group of row] transposed; only tiles of w are ever transposed."""
    return _rowwise(dout_NF, w_EDF, sizes_E, dtype, w_axis=2)


def _rowwise(lhs_NA, w_EDF, sizes_E, dtype, *, w_axis: int) -> jax.Array:
    """out_NB: rows times the matrix of their group, summed over axis `w_axis` of w_EDF."""
    (N, A), B = lhs_NA.shape, w_EDF.shape[3 - w_axis]
    if N == 0 or w_EDF.size == 0:
        return vary_like(jnp.zeros((N, B), dtype), lhs_NA, w_EDF, sizes_E)
    tiling = _tiling(lhs_NA.dtype, N, B, A)
    group_C, first_C, end_C = _row_tiles(sizes_E, N, tiling.rows)
    columns = pl.cdiv(B, tiling.columns)
    return call_kernel(
        functools.partial(_rowwise_kernel, w_axis, tiling),
        # Columns of one tile of rows beside each other: the rows are then read from memory once, and the
        # group's matrix stays in the cache.
        grid=(group_C.shape[0] * columns,),
        results=((N, B), dtype),
        warps=tiling.warps,
        stages=tiling.stages,
    )(group_C, first_C, end_C, lhs_NA, w_EDF)


def _row_tiles(sizes_E: jax.Array, N: int, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Per tile its group (E is the tail), its first row and its group's end; unused tiles begin behind that."""
    E = sizes_E.shape[0]
    count = pl.cdiv(N, rows) + E
    bounds = jnp.append(group_bounds(sizes_E, N), jnp.int32(N))
    tiles_before = jnp.cumsum((jnp.diff(bounds) + (rows - 1)) // rows, dtype=jnp.int32)
    tile_C = lax.iota(jnp.int32, count)
    group_C = jnp.searchsorted(tiles_before, tile_C, side="right", method="compare_all").astype(jnp.int32)
    group_C = jnp.minimum(group_C, E)
    first_tile_C = jnp.pad(tiles_before, (1, 0))[group_C]
    return group_C, bounds[group_C] + (tile_C - first_tile_C) * rows, bounds[group_C + 1]


def _rowwise_kernel(w_axis, tiling, group_ref, first_ref, end_ref, lhs_ref, w_ref, out_ref):
    E, A, B = w_ref.shape[0], w_ref.shape[w_axis], w_ref.shape[3 - w_axis]
    columns = pl.cdiv(B, tiling.columns)
    tile = pl.program_id(0) // columns
    column = pl.program_id(0) % columns * tiling.columns
    group, row, end = group_ref[tile], first_ref[tile], end_ref[tile]

    @pl.when(row < end)
    def _():
        rows, out_columns = pl.ds(row, tiling.rows), pl.ds(column, tiling.columns)
        is_row = row + lax.iota(jnp.int32, tiling.rows) < end
        is_column = column + lax.iota(jnp.int32, tiling.columns) < B
        matrix = jnp.minimum(group, E - 1)

        def step(i, sum_RC):
            k = i * tiling.depth
            is_k = k + lax.iota(jnp.int32, tiling.depth) < A
            depth = pl.ds(k, tiling.depth)
            lhs = _load(lhs_ref.at[rows, depth], is_row, is_k)
            if w_axis == 1:
                return sum_RC + _dot(lhs, _load(w_ref.at[matrix, depth, out_columns], is_k, is_column), 1, 0)
            return sum_RC + _dot(lhs, _load(w_ref.at[matrix, out_columns, depth], is_column, is_k), 1, 1)

        # The tail is a group with nothing to sum.
        steps = jnp.where(group < E, jnp.int32(pl.cdiv(A, tiling.depth)), jnp.int32(0))
        zero = jnp.zeros((tiling.rows, tiling.columns), wide(lhs_ref.dtype))
        out = lax.fori_loop(jnp.int32(0), steps, step, zero).astype(out_ref.dtype)
        plgpu.store(out_ref.at[rows, out_columns], out, mask=is_row[:, None] & is_column[None, :])


def drhs(rows_ND, dout_NF, sizes_E, dtype: DTypeLike) -> jax.Array:
    """dw_EDF[e] = rows_ND[group e] transposed @ dout_NF[group e]."""
    (N, D), F, E = rows_ND.shape, dout_NF.shape[1], sizes_E.shape[0]
    if 0 in (N, D, F, E):
        return vary_like(jnp.zeros((E, D, F), dtype), rows_ND, dout_NF, sizes_E)
    tiling = _tiling(rows_ND.dtype, D, F, N)
    return call_kernel(
        functools.partial(_drhs_kernel, tiling),
        grid=(E * pl.cdiv(D, tiling.rows) * pl.cdiv(F, tiling.columns),),
        results=((E, D, F), dtype),
        warps=tiling.warps,
        stages=tiling.stages,
    )(group_bounds(sizes_E, N), rows_ND, dout_NF)


def _drhs_kernel(tiling, bounds_ref, rows_ref, dout_ref, dw_ref):
    _, D, F = dw_ref.shape
    tiles_D, tiles_F = pl.cdiv(D, tiling.rows), pl.cdiv(F, tiling.columns)
    group = pl.program_id(0) // (tiles_D * tiles_F)
    d = pl.program_id(0) // tiles_F % tiles_D * tiling.rows
    f = pl.program_id(0) % tiles_F * tiling.columns
    start, end = bounds_ref[group], bounds_ref[group + 1]
    at_d, at_f = pl.ds(d, tiling.rows), pl.ds(f, tiling.columns)
    is_d = d + lax.iota(jnp.int32, tiling.rows) < D
    is_f = f + lax.iota(jnp.int32, tiling.columns) < F

    def step(i, sum_DF):
        row = start + i * tiling.depth
        is_row = row + lax.iota(jnp.int32, tiling.depth) < end
        # Masked on both sides: 0 times a NaN of a foreign row would be NaN.
        rows = _load(rows_ref.at[pl.ds(row, tiling.depth), at_d], is_row, is_d)
        dout = _load(dout_ref.at[pl.ds(row, tiling.depth), at_f], is_row, is_f)
        return sum_DF + _dot(rows, dout, 0, 0)

    steps = (end - start + (tiling.depth - 1)) // tiling.depth
    zero = jnp.zeros((tiling.rows, tiling.columns), wide(rows_ref.dtype))
    sum_DF = lax.fori_loop(jnp.int32(0), steps, step, zero)
    plgpu.store(dw_ref.at[group, at_d, at_f], sum_DF.astype(dw_ref.dtype), mask=is_d[:, None] & is_f[None, :])


def _tiling(dtype, rows: int, columns: int, depth: int) -> Tiling:
    """The type's tiling, cut down to what a small product needs."""
    tiling = _TILING_16_BIT if jnp.dtype(dtype).itemsize <= 2 else _TILING_WIDE

    def cut(tile: int, size: int) -> int:
        return min(tile, max(pl.next_power_of_2(size), _SMALLEST))

    return tiling._replace(
        rows=cut(tiling.rows, rows), columns=cut(tiling.columns, columns), depth=cut(tiling.depth, depth)
    )


def call_kernel(kernel, *, grid, results, warps: int, stages: int = 1, aliases=None):
    """A function of the operands that runs a kernel, in Pallas's interpreter on CPU.

    Args:
      kernel: a `functools.partial` of static arguments; its function's name is what the program calls it.
      results: (shape, dtype) of the result, or a list of such.
      warps, stages: of a program, and steps of its loop that are loaded ahead.
      aliases: operand to result that takes its place in memory, by number.
    """

    def run(*operands):
        one = isinstance(results, tuple)
        shapes = [result_like(*result, *operands) for result in ([results] if one else results)]
        return pl.pallas_call(
            kernel,
            grid=grid,
            out_shape=shapes[0] if one else shapes,
            input_output_aliases=aliases or {},
            compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
            interpret=target().platform == "cpu",
            name=kernel.func.__name__.strip("_"),
        )(*operands)

    return run


def _load(ref, is_row, is_column):
    return plgpu.load(ref, mask=is_row[:, None] & is_column[None, :], other=0)


def _dot(a, b, a_axis: int, b_axis: int):
    """Product of two tiles, summed over one axis of each; of f32 tiles without rounding them to TF32."""
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=wide(a.dtype),
    )
