"""Matrix products of rows packed by group, one matrix per group, with their gradients.

Shapes: N rows, E groups (experts), D and F the two widths. Group e owns the group_sizes_E[e] rows behind
those of the groups before it; rows behind the last group are the tail.

Three products belong together, each one's gradients are the other two:
  grouped_matmul       out_NF  = rows_ND @ w_EDF[group of row]
  grouped_matmul_dlhs  rows_ND = dout_NF @ w_EDF[group of row] transposed
  grouped_matmul_drhs  w_EDF   = per group, rows_ND transposed @ dout_NF
All sum in at least f32; the tail gives 0 and is never summed, whatever is in it.

tokamax is not among the implementations, though benchmarks/grouped_matmul.py measures it where it is installed. Its
release for Python 3.11 (0.0.12) wants typeguard 2.13, which the command line's tyro excludes, and reads the program's
command line as its own flags; its Triton kernel gives wrong weight gradients for empty groups, and its Mosaic kernels
copy transposes for both gradients. What it has beyond our Triton kernels, Mosaic's warpgroup products, is taken from
jax itself here.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from custom_ops import (
    grouped_matmul_mosaic,
    grouped_matmul_native,
    grouped_matmul_triton,
    grouped_matmul_windows,
    native,
    reference,
)
from custom_ops.arguments import RULES
from custom_ops.checks import checked, one_of, require
from custom_ops.dtypes import common
from custom_ops.target import target
from custom_ops.varying import vary_alike

# Under this name the policies of `jax.checkpoint` know the forward product.
GROUPED_PRODUCT = "moejax_grouped_product"


class Implementation(NamedTuple):
    """The three products of one implementation: (operand, operand, group sizes, result's dtype) -> result."""

    forward: Callable[[jax.Array, jax.Array, jax.Array, DTypeLike], jax.Array]
    dlhs: Callable[[jax.Array, jax.Array, jax.Array, DTypeLike], jax.Array]
    drhs: Callable[[jax.Array, jax.Array, jax.Array, DTypeLike], jax.Array]


IMPLEMENTATIONS = {
    "native": Implementation(
        grouped_matmul_native.forward, grouped_matmul_native.dlhs, grouped_matmul_native.drhs
    ),
    "mosaic": Implementation(
        grouped_matmul_mosaic.forward, grouped_matmul_mosaic.dlhs, grouped_matmul_mosaic.drhs
    ),
    "triton": Implementation(
        grouped_matmul_triton.forward, grouped_matmul_triton.dlhs, grouped_matmul_triton.drhs
    ),
    "windows": Implementation(
        grouped_matmul_windows.forward, grouped_matmul_windows.dlhs, grouped_matmul_windows.drhs
    ),
    "reference": Implementation(
        reference.grouped_matmul, reference.grouped_matmul_dlhs, reference.grouped_matmul_drhs
    ),
}


class Choice(NamedTuple):
    """The implementation taken where none is named, and why it is that one."""

    name: str
    reason: str


def default_implementation(
    dtype: DTypeLike, D: int, F: int, E: int, result_dtype: DTypeLike | None = None
) -> Choice:
    """What is taken when no implementation is named, for E matrices [D, F] of a dtype.

    It depends on the device that is being traced for (see `custom_ops.target`), so a program for GPUs gets the
    kernels for GPUs also on a machine without one.
    """
    platform = target().platform
    if platform == "gpu":
        misfit = grouped_matmul_mosaic.misfit(dtype, D, F, E, result_dtype)
        if misfit is None:
            return Choice("mosaic", f"{target().kind}, 16-bit operands, aligned widths")
        return Choice("triton", f"not mosaic: {misfit}")
    if platform == "cpu" and native.cpu_library() is not None:
        return Choice("native", "the platform is cpu, the library was built")
    # Plain XLA: right everywhere, at no more FLOPs than the groups have.
    return Choice("windows", f"the platform is {platform}, without native kernels")


_checked = checked(RULES | {"implementation": one_of(IMPLEMENTATIONS)})


@_checked
def grouped_matmul(
    rows_ND: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: str | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """out_NF: every row times the matrix of its group; tail rows give 0. Named GROUPED_PRODUCT for `jax.checkpoint`.

    Args:
      rows_ND: rows packed by group from row 0.
      w_EDF: one matrix per group, of the rows' dtype.
      group_sizes_E: int32 rows per group; a negative size is 0, and what exceeds N in all is cut off.
      implementation: a key of IMPLEMENTATIONS; None takes `default_implementation`.
      dtype: of the result; None takes that of the rows.

    Raises:
      ValueError: unknown implementation, or ranks, sizes or dtypes that do not belong together.
    """
    _require_one_dtype(rows_ND, "w_EDF", w_EDF, "rows_ND")
    E, D, F = w_EDF.shape
    require(rows_ND.shape[1] == D, "rows_ND", rows_ND, f"must have width {D} as in w_EDF {w_EDF.shape}")
    require(group_sizes_E.shape[0] == E, "group_sizes_E", group_sizes_E, f"must have {E} groups as in w_EDF")
    rule = _rule(implementation, dtype, rows_ND, D, F, E)
    return checkpoint_name(_forward(*rule, *vary_alike(rows_ND, w_EDF, group_sizes_E)), GROUPED_PRODUCT)


@_checked
def grouped_matmul_dlhs(
    dout_NF: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: str | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """drows_ND: every row times the transposed matrix of its group; tail rows give 0.

    Everything else as in `grouped_matmul`.
    """
    _require_one_dtype(dout_NF, "w_EDF", w_EDF, "dout_NF")
    E, D, F = w_EDF.shape
    require(dout_NF.shape[1] == F, "dout_NF", dout_NF, f"must have width {F} as in w_EDF {w_EDF.shape}")
    require(group_sizes_E.shape[0] == E, "group_sizes_E", group_sizes_E, f"must have {E} groups as in w_EDF")
    rule = _rule(implementation, dtype, dout_NF, D, F, E)
    return _dlhs(*rule, *vary_alike(dout_NF, w_EDF, group_sizes_E))


@_checked
def grouped_matmul_drhs(
    rows_ND: jax.Array,
    dout_NF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: str | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """dw_EDF: per group the sum of the outer products of its rows; 0 for an empty group.

    Everything else as in `grouped_matmul`.
    """
    _require_one_dtype(rows_ND, "dout_NF", dout_NF, "rows_ND")
    (N, D), F, E = rows_ND.shape, dout_NF.shape[1], group_sizes_E.shape[0]
    require(dout_NF.shape[0] == N, "dout_NF", dout_NF, f"must have {N} rows as in rows_ND")
    rule = _rule(implementation, dtype, rows_ND, D, F, E)
    return _drhs(*rule, *vary_alike(rows_ND, dout_NF, group_sizes_E))


def _require_one_dtype(lhs: jax.Array, rhs_name: str, rhs: jax.Array, lhs_name: str) -> None:
    require(lhs.dtype == rhs.dtype, rhs_name, rhs, f"must have dtype {lhs.dtype} as {lhs_name}")


def _rule(implementation, dtype, lhs: jax.Array, D: int, F: int, E: int) -> tuple[str, jnp.dtype]:
    result_dtype = jnp.dtype(lhs.dtype if dtype is None else dtype)
    if implementation is None:
        return default_implementation(lhs.dtype, D, F, E, result_dtype).name, result_dtype
    return implementation, result_dtype


def _alike(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both in one dtype: the gradient of a result that was asked for in another one comes in that."""
    dtype = common(a.dtype, b.dtype)
    return a.astype(dtype), b.astype(dtype)


# The rules: static arguments first; each backward is made of the other two products, so that it can be
# differentiated in turn.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _forward(name, dtype, rows_ND, w_EDF, sizes_E):
    return IMPLEMENTATIONS[name].forward(*_alike(rows_ND, w_EDF), sizes_E, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dlhs(name, dtype, dout_NF, w_EDF, sizes_E):
    return IMPLEMENTATIONS[name].dlhs(*_alike(dout_NF, w_EDF), sizes_E, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _drhs(name, dtype, rows_ND, dout_NF, sizes_E):
    return IMPLEMENTATIONS[name].drhs(*_alike(rows_ND, dout_NF), sizes_E, dtype)


def _forward_fwd(name, dtype, rows_ND, w_EDF, sizes_E):
    return _forward(name, dtype, rows_ND, w_EDF, sizes_E), (rows_ND, w_EDF, sizes_E)


def _forward_bwd(name, dtype, saved, dout_NF):
    rows_ND, w_EDF, sizes_E = saved
    drows_ND = _dlhs(name, rows_ND.dtype, dout_NF, w_EDF, sizes_E)
    return drows_ND, _drhs(name, w_EDF.dtype, rows_ND, dout_NF, sizes_E), None


def _dlhs_fwd(name, dtype, dout_NF, w_EDF, sizes_E):
    return _dlhs(name, dtype, dout_NF, w_EDF, sizes_E), (dout_NF, w_EDF, sizes_E)


def _dlhs_bwd(name, dtype, saved, g_ND):
    dout_NF, w_EDF, sizes_E = saved
    ddout_NF = _forward(name, dout_NF.dtype, g_ND, w_EDF, sizes_E)
    return ddout_NF, _drhs(name, w_EDF.dtype, g_ND, dout_NF, sizes_E), None


def _drhs_fwd(name, dtype, rows_ND, dout_NF, sizes_E):
    return _drhs(name, dtype, rows_ND, dout_NF, sizes_E), (rows_ND, dout_NF, sizes_E)


def _drhs_bwd(name, dtype, saved, g_EDF):
    rows_ND, dout_NF, sizes_E = saved
    drows_ND = _dlhs(name, rows_ND.dtype, dout_NF, g_EDF, sizes_E)
    return drows_ND, _forward(name, dout_NF.dtype, rows_ND, g_EDF, sizes_E), None


_forward.defvjp(_forward_fwd, _forward_bwd)
_dlhs.defvjp(_dlhs_fwd, _dlhs_bwd)
_drhs.defvjp(_drhs_fwd, _drhs_bwd)
