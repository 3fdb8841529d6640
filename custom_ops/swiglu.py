"""SwiGLU between an expert's two products, and its backward pass fused with the combine weights.

Shapes: N rows, F hidden width; hidden holds the gate's F columns, then the F columns it gates.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from custom_ops import native, reference
from custom_ops.arguments import RULES
from custom_ops.checks import checked, require


@checked(RULES)
def swiglu(hidden_N2F: jax.Array) -> jax.Array:
    """a_NF = silu(gate) * up (Shazeer 2020, eq. 6).

    Raises:
      ValueError: not a floating-point matrix of an even number of columns.
    """
    _check(hidden_N2F)
    return _forward(hidden_N2F) if _by_library(hidden_N2F) else reference.swiglu(hidden_N2F)


@checked(RULES)
def swiglu_backward(
    hidden_N2F: jax.Array, da_NF: jax.Array, weight_N: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the backward pass of weight * swiglu(hidden) @ w needs, in one pass over the data.

    Args:
      da_NF: gradient of the activation before weighting, of the dtype sums are formed in.
      weight_N: combine weight of each row, of that dtype too.

    Returns:
      weighted_a_NF = weight * swiglu(hidden) and dh_N2F, of hidden's dtype; d_weight_N = <da, swiglu(hidden)>.

    Raises:
      ValueError: shapes or dtypes that do not belong together.
    """
    _check(hidden_N2F)
    N, H = hidden_N2F.shape
    require(da_NF.shape == (N, H // 2), "da_NF", da_NF, f"must have shape {(N, H // 2)} as hidden_N2F")
    require(weight_N.shape == (N,), "weight_N", weight_N, f"must have shape {(N,)} as hidden_N2F")
    require(weight_N.dtype == da_NF.dtype, "weight_N", weight_N, f"must have dtype {da_NF.dtype} as da_NF")
    if not _by_library(hidden_N2F) or da_NF.dtype != hidden_N2F.dtype:
        return reference.swiglu_backward(hidden_N2F, da_NF, weight_N)
    return _backward(hidden_N2F, da_NF, weight_N)


# By the library, and differentiated as the specification is.


@jax.custom_vjp
def _forward(hidden_N2F):
    def library(hidden_N2F):
        N, H = hidden_N2F.shape
        return native.call("moejax_swiglu", jax.ShapeDtypeStruct((N, H // 2), hidden_N2F.dtype), hidden_N2F)

    return native.on_cpu(library, reference.swiglu, (hidden_N2F,))


@jax.custom_vjp
def _backward(hidden_N2F, da_NF, weight_N):
    def library(hidden_N2F, da_NF, weight_N):
        results = [jax.ShapeDtypeStruct(like.shape, like.dtype) for like in (da_NF, hidden_N2F, weight_N)]
        return tuple(native.call("moejax_swiglu_backward", results, hidden_N2F, da_NF, weight_N))

    return native.on_cpu(library, reference.swiglu_backward, (hidden_N2F, da_NF, weight_N))


def _as_specified(specification):
    """The backward rule that differentiates the specification at the saved operands."""
    return lambda saved, cotangents: jax.vjp(specification, *saved)[1](cotangents)


_forward.defvjp(lambda *operands: (_forward(*operands), operands), _as_specified(reference.swiglu))
_backward.defvjp(lambda *operands: (_backward(*operands), operands), _as_specified(reference.swiglu_backward))


def _by_library(hidden_N2F: jax.Array) -> bool:
    # Of 16-bit numbers XLA makes one loop, with the conversions in it.
    return hidden_N2F.dtype in (jnp.float32, jnp.float64) and native.cpu_library() is not None


def _check(hidden_N2F: jax.Array) -> None:
    is_even = hidden_N2F.shape[1] % 2 == 0
    require(is_even, "hidden_N2F", hidden_N2F, "must have an even number of columns")
