"""The ragged exchange: only rows that exist travel, into one buffer that all senders share.

Shapes: T tokens on this device, D model width, K experts per token, P devices on the axis, M rows to send, N rows of
the buffer they arrive in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from custom_ops import make_plan, permute, unpermute
from custom_ops.target import target
from custom_ops.varying import vary_like
from moejax.exchange import Arrived
from moejax.kept import account
from moejax.order import waiting
from moejax.wire import pack_choices, send, send_back, unpack_choices


class Lanes(NamedTuple):
    """Where the rows lie that this device sends to, and receives from, each of the P devices; all i32.

    Fields:
      begin_P, size_P: the rows for each device, in the buffer sent from.
      target_P: where each device puts them, in its own buffer.
      received_P: rows that come from each device.
    """

    begin_P: jax.Array
    size_P: jax.Array
    target_P: jax.Array
    received_P: jax.Array


@dataclass(frozen=True)
class Ragged:
    """`jax.lax.ragged_all_to_all`, which GPUs have; elsewhere the same from an all-gather, for tests.

    As `AllToAll` a token crosses to a device once, but there is one buffer for all senders instead of one bucket for
    each, so that only a device that is wanted too much by all together is ever full. Costs one more small message:
    how many rows everyone has for everyone.

    Fields:
      axis, experts_below, wire: as of `AllToAll`.
      rows: N.
    """

    axis: str
    experts_below: int
    rows: int
    wire: str = "none"

    def dispatch(self, x_TD, ids_TK, weights_TK):
        """As `Exchange.dispatch`."""
        plan = make_plan(ids_TK // self.experts_below, jax.lax.axis_size(self.axis), unique=True)
        there, back = _lanes(plan.group_sizes_P, self.axis, self.rows)
        ticket = (plan, there, back)
        go = self._move(there, back, self.rows)
        message = go(permute(pack_choices(ids_TK, weights_TK), plan))
        rows_ND = send(permute(x_TD, plan), go, self.wire)
        first = jax.lax.axis_index(self.axis) * self.experts_below
        fill = jnp.sum(there.received_P).astype(jnp.float32) / self.rows
        # What finds no room is refused by the receiver.
        unsent = jnp.int32(0)
        choices = account(unpack_choices(message, first, self.experts_below))
        return Arrived(rows_ND, *choices, fill, unsent, ticket)

    def combine(self, y_ND, served_NK, ticket):
        """As `Exchange.combine`; rows that found no room come back as zeros."""
        plan, there, back = ticket
        go_back = self._move(back, there, plan.choice_N.shape[0])
        y_TD = unpermute(send_back(y_ND, go_back, self.wire), plan)
        served_TK = unpermute(go_back(served_NK.astype(jnp.int8)).astype(jnp.float32), plan)
        return y_TD, served_TK > 0

    def _move(self, there: Lanes, back: Lanes, num_rows: int):
        return Partial(partial(_moved, axis=self.axis, num_rows=num_rows), there, back)


def _moved(there, back, rows, *, axis, num_rows):
    return _exchange(axis, num_rows, rows, there, back)


def _lanes(count_P: jax.Array, axis: str, capacity: int) -> tuple[Lanes, Lanes]:
    """The way there and back, from the rows that this device has for each; a full receiver takes no more.

    Every device computes its own from the matrix of all counts, senders by rows.
    """
    me = jax.lax.axis_index(axis)
    count_PP = jax.lax.all_gather(count_P, axis)
    begin_PP = jnp.cumsum(count_PP, axis=1, dtype=jnp.int32) - count_PP
    target_PP = jnp.minimum(jnp.cumsum(count_PP, axis=0, dtype=jnp.int32) - count_PP, capacity)
    size_PP = jnp.minimum(count_PP, capacity - target_PP)
    there = Lanes(begin_PP[me], size_PP[me], target_PP[me], size_PP[:, me])
    back = Lanes(target_PP[:, me], size_PP[:, me], begin_PP[:, me], size_PP[me])
    return there, back


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _exchange(axis: str, num_rows: int, rows: jax.Array, there: Lanes, back: Lanes) -> jax.Array:
    """[num_rows, ...]: the rows that arrive, zeros elsewhere. Its gradient takes the opposite way."""
    empty = vary_like(jnp.zeros((num_rows, *rows.shape[1:]), rows.dtype), rows)
    # Not `platform_dependent`: XLA keeps a conditional around collectives, which on CPU may run beside others and hang.
    if target().platform == "gpu":
        return _native(axis, rows, empty, there)
    return _emulated(axis, rows, empty, waiting(there, rows))


def _exchange_forward(axis, num_rows, rows, there, back):
    return _exchange(axis, num_rows, rows, there, back), (jnp.zeros_like(rows[:, :0]), there, back)


def _exchange_backward(axis, num_rows, saved, d_arrived):
    rows, there, back = saved
    return _exchange(axis, rows.shape[0], d_arrived, back, there), None, None


_exchange.defvjp(_exchange_forward, _exchange_backward)


def _native(axis: str, rows: jax.Array, empty: jax.Array, lanes: Lanes) -> jax.Array:
    return jax.lax.ragged_all_to_all(
        rows, empty, lanes.begin_P, lanes.size_P, lanes.target_P, lanes.received_P, axis_name=axis
    )


def _emulated(axis: str, rows: jax.Array, empty: jax.Array, lanes: Lanes) -> jax.Array:
    me = jax.lax.axis_index(axis)
    rows_PM, lanes_PP = jax.lax.all_gather((rows, lanes), axis)
    row_N = jnp.arange(empty.shape[0], dtype=jnp.int32)
    for sender in range(jax.lax.axis_size(axis)):
        begin, size, target = (lane[sender, me] for lane in lanes_PP[:3])
        offset_N = row_N - target
        source_N = jnp.clip(begin + offset_N, 0, rows.shape[0] - 1)
        is_here_N = (offset_N >= 0) & (offset_N < size)
        is_here_N = is_here_N.reshape(-1, *(1,) * (rows.ndim - 1))
        empty = jnp.where(is_here_N, rows_PM[sender][source_N], empty)
    return empty
