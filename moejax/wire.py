"""What one device sends to another: rows, whole or compressed, and beside them the choices they carry.

Shapes: T tokens, N rows, D model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

# A linear map that carries rows between devices, whatever their dtype.
Move = Callable[[jax.Array], jax.Array]

# Compression of rows. "bf16": both ways, relative error 2**-9 per element. "fp8": e4m3 with one scale per row towards
# the experts, error at most 2**-4 of an element or 2**-10 of the largest in its row, whichever is larger; bf16 on
# the way back; in backward bf16 towards the experts and no compression back. "all_gather" sums its results in bf16 too.
WIRES = ("none", "bf16", "fp8")

_FP8 = jnp.float8_e4m3fn
_FP8_MAX = float(jnp.finfo(_FP8).max)


def row_bytes(width: int, dtype: jax.typing.DTypeLike, wire: str) -> tuple[int, int]:
    """Of one row of so many numbers, towards the experts and back; with fp8 its f32 scale goes beside it."""
    whole = width * jnp.dtype(dtype).itemsize
    return {"none": (whole, whole), "bf16": (2 * width, 2 * width), "fp8": (width + 4, 2 * width)}[wire]


def pack_choices(ids_TK: jax.Array, weights_TK: jax.Array) -> jax.Array:
    """One small message [T, 2K] per token: its weights and its experts.

    f32 holds every expert id exactly. Ids are shifted by one, so that an empty row, which arrives as zeros, has none.
    """
    dtype = jnp.promote_types(weights_TK.dtype, jnp.float32)
    return jnp.concatenate([weights_TK.astype(dtype), (ids_TK + 1).astype(dtype)], axis=1)


def unpack_choices(message_N2K: jax.Array, first: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """ids_NK, counted from `first` (-1 outside of the `count` experts from there), and weights_NK."""
    weights_NK, ids_NK = jnp.split(message_N2K, 2, axis=1)
    ids_NK = jax.lax.stop_gradient(ids_NK).astype(jnp.int32) - 1 - first
    return jnp.where((ids_NK >= 0) & (ids_NK < count), ids_NK, -1), weights_NK


def send(rows_ND: jax.Array, move: Move, wire: str) -> jax.Array:
    """Rows towards the experts, compressed as `wire` says; the dtype that arrives is the one that left."""
    if wire == "fp8":
        # A pytree: what it holds may be traced, as its differentiation rule must know.
        return _send_fp8(move if isinstance(move, Partial) else Partial(move), rows_ND)
    return _send_cast(rows_ND, move, wire)


def send_back(rows_ND: jax.Array, move: Move, wire: str) -> jax.Array:
    """Results on the way back."""
    return _send_cast(rows_ND, move, "none" if wire == "none" else "bf16")


def _send_cast(rows_ND: jax.Array, move: Move, wire: str) -> jax.Array:
    if wire == "bf16":
        return move(rows_ND.astype(jnp.bfloat16)).astype(rows_ND.dtype)
    return move(rows_ND)


@jax.custom_vjp
def _send_fp8(move: Partial, rows_ND: jax.Array) -> jax.Array:
    largest_N1 = jnp.max(jnp.abs(rows_ND), axis=1, keepdims=True).astype(jnp.float32)
    scale_N1 = jnp.where(largest_N1 > 0, largest_N1 / _FP8_MAX, 1)
    payload_ND = (rows_ND.astype(jnp.float32) / scale_N1).astype(_FP8)
    # As bytes: collectives of eight-bit floats are not available everywhere.
    arrived_ND = move(jax.lax.bitcast_convert_type(payload_ND, jnp.uint8))
    rows = jax.lax.bitcast_convert_type(arrived_ND, _FP8).astype(jnp.float32) * move(scale_N1)
    return rows.astype(rows_ND.dtype)


def _send_fp8_forward(move, rows_ND):
    return _send_fp8(move, rows_ND), (move, jnp.zeros_like(rows_ND))


def _send_fp8_backward(saved, d_rows_ND):
    move, zeros_ND = saved
    (d_sent_ND,) = jax.vjp(move, zeros_ND)[1](d_rows_ND)
    return None, d_sent_ND


_send_fp8.defvjp(_send_fp8_forward, _send_fp8_backward)
