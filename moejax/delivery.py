"""Delivery: dispatch as often as it takes, in pieces, with an account of what was not carried out.

Shapes: T tokens on this device, D model width, E experts in all, K experts per token, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.capacity import within_capacity
from moejax.dispatch import ExpertsFn, dispatch
from moejax.levels import REPEAT_FACTOR, Levels, default_factor, make_levels
from moejax.rounds import Pass, in_rounds
from moejax.shadow import Shadow, serve_hot
from moejax.wire import row_bytes

# What becomes of choices that find no room: "rounds" carries them out in further rounds; "drop" limits every expert
# to its capacity, as GShard and Switch do, and counts what is beyond it or beyond a bucket.
OVERFLOWS = ("rounds", "drop")
# Largest load of an expert under "drop", in units of the mean load (Switch Transformer, section 3.1).
DROP_CAPACITY_FACTOR = 1.25


class Account(NamedTuple):
    """What became of this device's choices.

    Fields:
      served_TK: bool, the choices that were carried out.
      over_capacity: number of the others that were beyond their expert's capacity, i32.
      at_sender: number of the others that found a bucket full before it was sent, i32, counted on the device whose
        bucket it was; the rest found a receiver's buffer full.
      rounds: passes through the layer, i32.
      fill_V: share of the row buffers of each level in use in the first pass, the experts' last, f32.
    """

    served_TK: jax.Array
    over_capacity: jax.Array
    at_sender: jax.Array
    rounds: jax.Array
    fill_V: jax.Array


def deliver(
    x_TD: jax.Array,
    ids_TK: jax.Array,
    weights_TK: jax.Array,
    experts: ExpertsFn,
    *,
    num_experts: int,
    axes: Sequence[str] = (),
    token_axes: Sequence[str] = (),
    exchange: str = "all_to_all",
    overflow: str = "rounds",
    capacity_factor: float | None = None,
    chunks: int = 1,
    shadow: Shadow | None = None,
    wire: str = "none",
) -> tuple[jax.Array, Account]:
    """y_t = sum_k weights[t, k] * expert_{ids[t, k]}(x_t), wherever the experts are.

    Args:
      ids_TK: experts 0..E - 1; -1 for none.
      axes: mesh axes over which experts are split, outermost first.
      token_axes: mesh axes over which the tokens of one batch are split.
      exchange: name in `levels.EXCHANGES`.
      overflow: name in `OVERFLOWS`.
      capacity_factor: size of every buffer, under "drop" also of every expert's capacity, in units of what balanced
        choices need; infinite: room for whatever may arrive, and no loop. None: `DROP_CAPACITY_FACTOR` under "drop",
        otherwise `CAPACITY_FACTOR` on a GPU and infinite on CPU, where memory is plenty and a loop needs care from
        whoever writes collectives around the layer (`moejax.order`).
      chunks: pieces in which the tokens go, so that one piece can travel while another is computed.
      shadow: the experts to be copied to every device for this batch.
      wire: compression of the rows between devices, name in `wire.WIRES`.
    """
    admitted_TK = ids_TK
    if overflow == "drop":
        capacity_factor = DROP_CAPACITY_FACTOR if capacity_factor is None else capacity_factor
        admitted_TK = within_capacity(ids_TK, num_experts, capacity_factor, token_axes)
    factor = default_factor() if capacity_factor is None else capacity_factor
    travelling_TK = admitted_TK
    if shadow is not None:
        hot_TD, is_hot_TK, x_TD = serve_hot(
            x_TD, admitted_TK, weights_TK, shadow, num_experts=num_experts, axes=axes
        )
        travelling_TK = jnp.where(is_hot_TK, -1, admitted_TK)
    num_tokens, top_k = ids_TK.shape
    chunks = chunks if axes else 1
    sizes = partial(
        make_levels,
        axes,
        num_experts=num_experts,
        num_tokens=-(-num_tokens // chunks),
        top_k=top_k,
        row_bytes=row_bytes(x_TD.shape[1], x_TD.dtype, wire),
        exchange=exchange,
        wire=wire,
    )
    levels = sizes(factor=factor)
    first = _one_pass(levels, experts, chunks)
    if overflow == "rounds" and levels.can_overflow:
        again = _one_pass(sizes(factor=factor * REPEAT_FACTOR), experts, chunks)
        y_TD, left_TK, rounds, facts = in_rounds(first, again, x_TD, weights_TK, travelling_TK, axes)
        (fills, _), at_sender = facts, jnp.int32(0)  # what is left behind is sent in a later round
    else:
        y_TD, served_TK, (fills, at_sender) = first(x_TD, weights_TK, travelling_TK)
        left_TK, rounds = jnp.where(served_TK, -1, travelling_TK), jnp.int32(1)
    over_capacity = jnp.sum(admitted_TK != ids_TK, dtype=jnp.int32)
    served_TK = (admitted_TK >= 0) & (left_TK < 0)
    if shadow is not None:
        y_TD = y_TD + hot_TD
    return y_TD, Account(served_TK, over_capacity, at_sender, rounds, jnp.stack(fills))


def _one_pass(levels: Levels, experts: ExpertsFn, chunks: int) -> Pass:
    """All tokens once through all levels, chunk by chunk; padding chooses nothing."""

    def run(x_TD, weights_TK, ids_TK):
        T = x_TD.shape[0]
        size = -(-T // chunks)
        parts = []
        for begin in range(0, max(T, 1), max(size, 1)):
            x_CD, weights_CK, ids_CK = (a[begin : begin + size] for a in (x_TD, weights_TK, ids_TK))
            parts.append(dispatch(x_CD, ids_CK, weights_CK, levels=levels, experts=experts))
        y_TD, served_TK = (jnp.concatenate(part) for part in list(zip(*parts, strict=True))[:2])
        fills = [sum(level) / len(parts) for level in zip(*(part.fills for part in parts), strict=True)]
        return y_TD, served_TK, (fills, sum(part.unsent for part in parts))

    return run
