"""Delivery: dispatch as often as it takes, in pieces, with an account of what was not carried out.

Shapes: T tokens on this device, D model width, E experts in all, K experts per token, C tokens of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from custom_ops.checks import BadArgument, instance_of, one_of, require
from custom_ops.varying import vary_like, varying_axes
from moejax.arguments import POSITIVE_OR_INFINITE, checked, experts_function
from moejax.capacity import within_capacity
from moejax.cost import Link
from moejax.dispatch import ExpertsFn, dispatch
from moejax.levels import EXCHANGES, REPEAT_FACTOR, Levels, check_links, default_factor, make_levels
from moejax.mesh import ambient_mesh
from moejax.rounds import Pass, in_rounds
from moejax.shadow import Shadow, serve_hot
from moejax.wire import WIRES, row_bytes

# What becomes of choices that find no room: "rounds" carries them out in further rounds; "drop" limits every expert
# to its capacity, as GShard and Switch do, and counts what is beyond it or beyond a bucket.
OVERFLOWS = ("rounds", "drop")
# Largest load of an expert under "drop", in units of the mean load (Switch Transformer, section 3.1).
DROP_CAPACITY_FACTOR = 1.25


@dataclass(frozen=True)
class Options:
    """How a layer's rows are delivered: those arguments of `deliver` that a layer fixes when it is built.

    Hashable, as everything static in an NNX module must be: otherwise its graphdef could not be hashed.

    Fields:
      links: (mesh axis, link) pairs, as `dict.items` gives them.

    The other fields are as of `deliver`.
    """

    exchange: str = "all_to_all"
    overflow: str = "rounds"
    capacity_factor: float | None = None
    chunks: int = 1
    wire: str = "none"
    links: tuple[tuple[str, Link], ...] | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `deliver` and `levels_of`."""
        return vars(self) | {"links": None if self.links is None else dict(self.links)}


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


def _axis_names(argument: str, value: Any) -> tuple[str, ...]:
    """Names of mesh axes."""
    is_names = isinstance(value, Sequence) and not isinstance(value, str)
    is_names = is_names and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)
    require(is_names, argument, value, "must be the names of different mesh axes in a tuple")
    return tuple(value)


@checked(
    experts=experts_function,
    axes=_axis_names,
    token_axes=_axis_names,
    exchange=one_of(EXCHANGES),
    overflow=one_of(OVERFLOWS),
    capacity_factor=POSITIVE_OR_INFINITE,
    shadow=instance_of(Shadow, "a Shadow"),
    wire=one_of(WIRES),
)
def deliver(
    x_TD: jax.Array,
    ids_TK: jax.Array,
    weights_TK: jax.Array,
    experts: ExpertsFn,
    *,
    num_experts: int,
    axes: Sequence[str] = (),
    token_axes: Sequence[str] | None = None,
    exchange: str = "all_to_all",
    overflow: str = "rounds",
    capacity_factor: float | None = None,
    chunks: int = 1,
    shadow: Shadow | None = None,
    wire: str = "none",
    links: Mapping[str, Link] | None = None,
) -> tuple[jax.Array, Account]:
    """y_t = sum_k weights[t, k] * expert_{ids[t, k]}(x_t), wherever the experts are.

    Args:
      ids_TK: experts 0..E - 1; -1 for none.
      axes: mesh axes over which experts are split, outermost first.
      token_axes: mesh axes over which the tokens of one batch are split, `axes` among them: under "drop" an expert's
        capacity is counted over all of them. None: `axes`.
      exchange: name in `levels.EXCHANGES`.
      overflow: name in `OVERFLOWS`.
      capacity_factor: size of every buffer, under "drop" also of every expert's capacity, in units of what balanced
        choices need; infinite: room for whatever may arrive, and no loop. None: `DROP_CAPACITY_FACTOR` under "drop",
        otherwise `CAPACITY_FACTOR` on a GPU and infinite on CPU, where memory is plenty and a loop needs care from
        whoever writes collectives around the layer (`moejax.order`).
      chunks: pieces in which the tokens go, so that one piece can travel while another is computed.
      shadow: the experts to be copied to every device for this batch.
      wire: compression of the rows between devices, name in `wire.WIRES`.
      links: what devices reach along the axes, for the exchange "auto"; see `make_levels`.

    Raises:
      ValueError: an unknown name, a number out of range, shapes that do not fit each other, an axis that no mesh axis
        inside `shard_map` has, or axes that do not divide the experts.
    """
    token_axes = tuple(axes if token_axes is None else token_axes)
    is_finite = capacity_factor is None or capacity_factor < math.inf
    rule = "must be a positive finite number under overflow 'drop'"
    require(is_finite or overflow != "drop", "capacity_factor", capacity_factor, rule)
    fits = ids_TK.shape[0] == x_TD.shape[0]
    require(fits, "ids_TK", ids_TK, f"must be [{x_TD.shape[0]}, choices], as x_TD has tokens")
    same = weights_TK.shape == ids_TK.shape
    require(same, "weights_TK", weights_TK, f"must have the shape of ids_TK, {list(ids_TK.shape)}")
    _check_axes(axes, token_axes)
    check_links(links, axes)
    if shadow is not None:
        shadow.check(num_experts)
    own_tokens = x_TD.shape[0]
    if not own_tokens and varying_axes(x_TD):
        # Collectives do not take empty arrays, so one token goes nowhere.
        absent = ((x_TD, 0), (ids_TK, -1), (weights_TK, 0))
        x_TD, ids_TK, weights_TK = (
            vary_like(jnp.full((1, array.shape[1]), fill, array.dtype), array) for array, fill in absent
        )
    experts = _of_the_same_shape(experts)
    admitted_TK = ids_TK
    if overflow == "drop":
        admitted_TK = within_capacity(ids_TK, num_experts, _factor(overflow, capacity_factor), token_axes)
    travelling_TK = admitted_TK
    if shadow is not None:
        hot_TD, is_hot_TK, x_TD = serve_hot(
            x_TD, admitted_TK, weights_TK, shadow, num_experts=num_experts, axes=axes
        )
        travelling_TK = jnp.where(is_hot_TK, -1, admitted_TK)
    num_tokens, top_k = ids_TK.shape
    chunks = chunks if axes else 1
    sizes = partial(
        levels_of,
        {axis: jax.lax.axis_size(axis) for axis in axes},
        num_experts=num_experts,
        num_tokens=num_tokens,
        top_k=top_k,
        width=x_TD.shape[1],
        dtype=x_TD.dtype,
        exchange=exchange,
        overflow=overflow,
        capacity_factor=capacity_factor,
        chunks=chunks,
        wire=wire,
        links=links,
    )
    levels = sizes()
    first = _one_pass(levels, experts, chunks)
    if overflow == "rounds" and levels.can_overflow:
        again = _one_pass(sizes(repeated=True), experts, chunks)
        y_TD, left_TK, rounds, facts = in_rounds(first, again, x_TD, weights_TK, travelling_TK, axes)
        (fills, _), at_sender = facts, jnp.int32(0)  # what is left behind is sent in a later round
    else:
        y_TD, served_TK, (fills, at_sender) = first(x_TD, weights_TK, travelling_TK)
        left_TK, rounds = jnp.where(served_TK, -1, travelling_TK), jnp.int32(1)
    over_capacity = jnp.sum(admitted_TK != ids_TK, dtype=jnp.int32)
    served_TK = (admitted_TK >= 0) & (left_TK < 0)
    if shadow is not None:
        y_TD = y_TD + hot_TD
    served_TK = served_TK[:own_tokens]
    return y_TD[:own_tokens], Account(served_TK, over_capacity, at_sender, rounds, jnp.stack(fills))


def levels_of(
    axes: Mapping[str, int],
    *,
    num_experts: int,
    num_tokens: int,
    top_k: int,
    width: int,
    dtype: jax.typing.DTypeLike,
    exchange: str,
    overflow: str,
    capacity_factor: float | None,
    chunks: int,
    wire: str,
    links: Mapping[str, Link] | None,
    repeated: bool = False,
) -> Levels:
    """The levels that one chunk goes through in a delivery over axes of these sizes.

    Args:
      num_tokens: T, of all chunks.
      width, dtype: of a row.
      repeated: in a further round instead of the first.

    The other arguments are as of `deliver`.
    """
    return make_levels(
        axes,
        num_experts=num_experts,
        num_tokens=-(-num_tokens // chunks),
        top_k=top_k,
        row_bytes=row_bytes(width, dtype, wire),
        exchange=exchange,
        factor=_factor(overflow, capacity_factor) * (REPEAT_FACTOR if repeated else 1),
        wire=wire,
        links=links,
    )


def _factor(overflow: str, capacity_factor: float | None) -> float:
    if capacity_factor is not None:
        return capacity_factor
    return DROP_CAPACITY_FACTOR if overflow == "drop" else default_factor()


def _of_the_same_shape(experts: ExpertsFn) -> ExpertsFn:
    """The same experts, refused where they return another shape than they got."""

    def run(x_TD, plan, weights_TK):
        y_TD = experts(x_TD, plan, weights_TK)
        same = getattr(y_TD, "shape", None) == x_TD.shape
        rule = f"experts must return one array of the shape that they got, {list(x_TD.shape)}"
        require(same, "experts", y_TD, rule)
        return y_TD

    return run


def _check_axes(axes: Sequence[str], token_axes: Sequence[str]) -> None:
    for argument, names in (("axes", axes), ("token_axes", token_axes)):
        for name in names:
            try:
                jax.lax.axis_size(name)
            except NameError:
                known = tuple(ambient_mesh().manual_axes)
                cure = (
                    f"there are {known}" if known else "call it inside jax.shard_map over a mesh that has it"
                )
                raise BadArgument(argument, names, f"{name!r} is no mesh axis here; {cure}") from None
    if missing := [name for name in axes if name not in token_axes]:
        raise BadArgument("token_axes", token_axes, f"must contain {missing[0]!r}, one of axes")


def _one_pass(levels: Levels, experts: ExpertsFn, chunks: int) -> Pass:
    """All tokens once through all levels, in chunks of one size but the last, which may be smaller."""

    def run(x_TD, weights_TK, ids_TK):
        T = x_TD.shape[0]
        size = -(-T // chunks)
        begins = range(0, max(T, 1), max(size, 1))
        cut = [tuple(a[begin : begin + size] for a in (x_TD, ids_TK, weights_TK)) for begin in begins]
        parts = dispatch(cut, levels=levels, experts=experts)
        y_TD, served_TK = (jnp.concatenate(part) for part in list(zip(*parts, strict=True))[:2])
        fills = [sum(level) / len(parts) for level in zip(*(part.fills for part in parts), strict=True)]
        return y_TD, served_TK, (fills, sum(part.unsent for part in parts))

    return run
