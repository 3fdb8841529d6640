"""The levels of a dispatch: which exchange carries the rows along which mesh axis, in buffers of which size.

Shapes: T tokens on this device, K experts per token, E experts in all, P devices on an axis, L experts below one of
them, B rows of a bucket.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from custom_ops.checks import BadArgument, one_of
from custom_ops.target import target
from moejax.cost import NETWORK, NVLINK, Link, cheapest_exchange, share_of_tokens
from moejax.exchange import AllGather, AllToAll, Exchange
from moejax.mesh import EXPERT_AXES
from moejax.ragged import Ragged

# "auto" takes, for every level, the cheaper of the first two by their estimated time; "ragged" only by name, since
# jax's primitive has known failures (NaN gradients, hangs beyond 32 devices).
EXCHANGES = ("all_to_all", "all_gather", "ragged", "auto")

# Rows of a buffer beyond what balanced choices fill it with on average. A bucket of n rows then overflows by chance
# when it is 0.15 * sqrt(n / (1 - n / T)) standard deviations off: beyond four of them from n = 700 on, where it happens
# once in 30,000 buckets.
CAPACITY_FACTOR = 1.15
# A repeated pass carries what was left, usually little, in buffers that are smaller by this factor.
REPEAT_FACTOR = 0.25
# Buffers are rounded up to this many rows, so that every bucket begins at an aligned address.
ROW_TILE = 8


@dataclass(frozen=True)
class Levels:
    """Static facts of the way to the experts.

    Fields:
      exchanges: wire levels, outermost first; none without expert parallelism.
      experts_per_device: experts at the end of the way.
      expert_rows: rows of the experts' buffer; None: one for every choice that can arrive.
      can_overflow: whether any buffer is smaller than the most that can arrive.
      estimates: for each axis whose exchange was "auto", the seconds of each that it could take, forward; see
        `moejax.cost`.
    """

    exchanges: tuple[Exchange, ...]
    experts_per_device: int
    expert_rows: int | None = None
    can_overflow: bool = False
    estimates: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def default_factor() -> float:
    """Size of the buffers of rounds where none is given, for the platform that is traced for."""
    return math.inf if target().platform == "cpu" else CAPACITY_FACTOR


def make_levels(
    axes: Mapping[str, int],
    *,
    num_experts: int,
    num_tokens: int,
    top_k: int,
    row_bytes: tuple[int, int],
    exchange: str = "all_to_all",
    factor: float = CAPACITY_FACTOR,
    wire: str = "none",
    links: Mapping[str, Link] | None = None,
) -> Levels:
    """The levels over mesh axes.

    Args:
      axes: their sizes by name, outermost first.
      num_tokens: T, on this device.
      row_bytes: of one row on the wire, there and back.
      exchange: name in `EXCHANGES`.
      factor: size of every buffer in units of what balanced choices fill on average; may be infinite.
      wire: name in `WIRES`.
      links: what devices reach along each axis, by which "auto" chooses; of an axis that it does not have, or None:
        `NETWORK` between nodes, `NVLINK` within.

    Raises:
      ValueError: the axes do not divide the experts.
    """
    check_experts(num_experts, axes)
    exchanges: list[Exchange] = []
    estimates: dict[str, Mapping[str, float]] = {}
    rows = num_tokens  # that can arrive at the level
    below, sources, can_overflow = num_experts, 1, False
    for axis, P in axes.items():
        below //= P
        share = share_of_tokens(num_experts, below, top_k)
        bucket = _row_count(factor * share * sources * num_tokens, at_most=rows)
        name = exchange
        if exchange == "auto":
            shapes = dict(
                tokens=rows, bucket_rows=bucket, share=share, devices=P, row_bytes=row_bytes, top_k=top_k
            )
            usual = NETWORK if axis in EXPERT_AXES[:-1] else NVLINK
            name, estimates[axis] = cheapest_exchange((links or {}).get(axis, usual), **shapes)
        if name == "all_gather":
            exchanges.append(AllGather(axis, below, wire))
            rows *= P
        else:
            can_overflow |= bucket < rows
            rows = P * bucket
            if name == "ragged":
                exchanges.append(Ragged(axis, below, rows, wire))
            else:
                exchanges.append(AllToAll(axis, below, bucket, wire))
        sources *= P
    if not exchanges:
        return Levels((), num_experts)
    expert_rows = _row_count(factor * num_tokens * top_k, at_most=rows * top_k)
    if expert_rows >= rows * top_k:
        return Levels(tuple(exchanges), below, None, can_overflow, estimates)
    return Levels(tuple(exchanges), below, expert_rows, True, estimates)


def check_experts(num_experts: int, sizes: Mapping[str, int]) -> None:
    """Raise ValueError unless the experts can be split evenly over mesh axes of these sizes."""
    size = math.prod(sizes.values())
    if num_experts % size:
        names = " x ".join(repr(axis) for axis in sizes)
        raise BadArgument("num_experts", num_experts, f"must be a multiple of mesh axis {names} ({size})")


def check_links(links: Mapping[str, Link] | None, axes: Sequence[str]) -> None:
    """Raise ValueError for a link along what is neither one of `axes` nor of a layer's own expert axes."""
    for axis in links or ():
        one_of(tuple(dict.fromkeys((*EXPERT_AXES, *axes))))("links: mesh axis", axis)


def _row_count(rows: float, *, at_most: int) -> int:
    # `rows` may be infinite, or with no token at all not a number.
    wanted = max(math.ceil(rows / ROW_TILE), 1) * ROW_TILE if rows < at_most else at_most
    return max(min(wanted, at_most), 1)
