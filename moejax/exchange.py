"""Exchanges: how rows travel along one mesh axis to the devices that hold their experts, and back.

Shapes: T tokens on this device, D model width, K experts per token, P devices on the axis, B rows of a bucket,
N rows received, L experts below one device of the axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from custom_ops import make_plan, permute, unpermute
from moejax.kept import account
from moejax.wire import pack_choices, send, send_back, unpack_choices


class Arrived(NamedTuple):
    """What `Exchange.dispatch` brings to this device.

    Fields:
      rows_ND: token rows; empty ones are zero.
      ids_NK: their choices among the L experts below this device, -1 for all others.
      weights_NK: weights of the choices.
      fill: share of the buffers sent that held a row, f32 scalar.
      unsent: choices of this device that stay behind because a bucket was full before it was sent, i32 scalar.
      ticket: what `combine` needs to find the way back.
    """

    rows_ND: jax.Array
    ids_NK: jax.Array
    weights_NK: jax.Array
    fill: jax.Array
    unsent: jax.Array
    ticket: Any


class Exchange(Protocol):
    """One wire level of the dispatch recursion."""

    def dispatch(self, x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array) -> Arrived:
        """Send every token to the devices below which it chose an expert, as far as the buffers reach."""

    def combine(self, y_ND: jax.Array, served_NK: jax.Array, ticket: Any) -> tuple[jax.Array, jax.Array]:
        """Send results back; y_TD sums each token's, served_TK says which choices were carried out."""


@dataclass(frozen=True)
class AllToAll:
    """One `all_to_all` of static buckets [P, B, D] each way.

    A token that chose several experts below one device crosses once, and one summed row comes back. What finds its
    bucket full stays behind, unserved.

    Fields:
      axis: mesh axis; P is its size.
      experts_below: L. Device p of the axis leads to the experts p * L .. p * L + L - 1.
      rows: B.
      wire: compression of the rows, one of `WIRES`.
    """

    axis: str
    experts_below: int
    rows: int
    wire: str = "none"

    def dispatch(self, x_TD, ids_TK, weights_TK):
        """As `Exchange.dispatch`; N = P * B."""
        size = jax.lax.axis_size(self.axis)
        # Floor division keeps -1 ("none") at -1.
        plan = make_plan(ids_TK // self.experts_below, size, self.rows, unique=True)
        message = self._swap(permute(pack_choices(ids_TK, weights_TK), plan))
        rows_ND = send(permute(x_TD, plan), self._swap, self.wire)
        first = jax.lax.axis_index(self.axis) * self.experts_below
        fill = jnp.sum(plan.group_sizes_P).astype(jnp.float32) / (size * self.rows)
        unsent = jnp.sum((ids_TK >= 0) & ~plan.served_TK, dtype=jnp.int32)
        choices = account(unpack_choices(message, first, self.experts_below))
        return Arrived(rows_ND, *choices, fill, unsent, plan)

    def combine(self, y_ND, served_NK, ticket):
        """As `Exchange.combine`."""
        y_TD = unpermute(send_back(y_ND, self._swap, self.wire), ticket)
        # The devices of a token serve different choices of it, so that their masks add up to one.
        served_TK = unpermute(self._swap(served_NK.astype(jnp.int8)).astype(jnp.float32), ticket)
        return y_TD, served_TK > 0

    def _swap(self, rows: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(rows, self.axis, split_axis=0, concat_axis=0, tiled=True)


@dataclass(frozen=True)
class AllGather:
    """Every device gets all tokens of the axis; the results are summed where they came from (reduce-scatter).

    No buckets, so nothing stays behind here; the cheaper way when a token goes to nearly every device anyway.

    Fields: as of `AllToAll`.
    """

    axis: str
    experts_below: int
    wire: str = "none"

    def dispatch(self, x_TD, ids_TK, weights_TK):
        """As `Exchange.dispatch`; N = P * T."""
        message = self._gather(pack_choices(ids_TK, weights_TK))
        rows_ND = send(x_TD, self._gather, self.wire)
        first = jax.lax.axis_index(self.axis) * self.experts_below
        ids_NK, weights_NK = account(unpack_choices(message, first, self.experts_below))
        fill = jnp.mean(jnp.any(ids_NK >= 0, axis=1), dtype=jnp.float32)
        return Arrived(rows_ND, ids_NK, weights_NK, fill, jnp.int32(0), None)

    def combine(self, y_ND, served_NK, ticket):
        """As `Exchange.combine`."""
        return send_back(y_ND, self._scatter, self.wire), self._scatter(served_NK.astype(jnp.int8)) > 0

    def _gather(self, rows: jax.Array) -> jax.Array:
        return jax.lax.all_gather(rows, self.axis, tiled=True)

    def _scatter(self, rows: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(rows, self.axis, scatter_dimension=0, tiled=True)
