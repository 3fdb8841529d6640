"""The dispatch plan: which row of a buffer belongs to which choice of which token.

Shapes: T tokens, K choices per token, P destinations, N rows, B rows of one bucket.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from custom_ops import native
from custom_ops.arguments import RULES
from custom_ops.checks import MAX_ELEMENTS, checked, require
from custom_ops.varying import vary_like

# Up to here counting beats sorting on a CPU (0.15 against 0.5 ms at T*K = 8192, P = 8; equal near 40).
_COUNTING_MAX_DESTINATIONS = 32
# Lanes are counted side by side, so that the scan has about this many steps however many choices there are.
_COUNTING_STEPS = 128
# A warp per chunk, about as many as a large GPU runs at once; every chunk counts every destination, up to 4 MiB.
_CUDA_MAX_CHUNKS = 2048
_CUDA_MAX_COUNTERS = 2**20
_CUDA_MAX_DESTINATIONS = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DispatchPlan:
    """Row order of one dispatch level, as made by `make_plan`. A choice is the flat index t * K + k.

    Attributes:
      position_TK: int32, the row of each choice; -1 when it has no row of its own.
      choice_N: int32, the choice that each row belongs to; -1 for an empty row.
      group_sizes_P: int32, the rows present per destination.
      served_TK: bool, the choice is carried out, by a row of its own or by one it shares (`unique`).
      num_invalid: int32 scalar, destinations that were neither -1 nor in [0, P), and were treated as -1.
      num_choices: K (static).
    """

    position_TK: jax.Array
    choice_N: jax.Array
    group_sizes_P: jax.Array
    served_TK: jax.Array
    num_invalid: jax.Array
    num_choices: int = dataclasses.field(metadata={"static": True})

    @property
    def token_N(self) -> jax.Array:
        """int32, the token of each row; -1 for an empty row."""
        return jnp.where(self.choice_N >= 0, self.choice_N // self.num_choices, -1)

    def at_most(self, count: int) -> "DispatchPlan":
        """Of a packed plan, not `unique`, `count` of its rows at most; the other choices are clipped.

        Where there are more, the rows kept lie at equal distances: every destination keeps the same share of its rows,
        to within one row, and within a destination every part of the tokens does. Which ones depends on the numbers of
        rows alone.
        """
        size = self.choice_N.shape[0]
        if count >= size:
            return self
        kept_before = functools.partial(_kept_before, _step(jnp.sum(self.group_sizes_P), count))
        row_N = lax.iota(jnp.int32, size)
        target_N = kept_before(row_N)
        is_kept_N = (kept_before(row_N + 1) > target_N) & (self.choice_N >= 0)
        choice_N = vary_like(jnp.full((count,), -1, jnp.int32), self.choice_N)
        choice_N = choice_N.at[jnp.where(is_kept_N, target_N, count)].set(
            self.choice_N, mode="drop", wrap_negative_indices=False
        )
        begin_TK = kept_before(jnp.maximum(self.position_TK, 0))
        is_kept_TK = (self.position_TK >= 0) & (kept_before(self.position_TK + 1) > begin_TK)
        ends_P = kept_before(jnp.cumsum(self.group_sizes_P, dtype=jnp.int32))
        return dataclasses.replace(
            self,
            position_TK=jnp.where(is_kept_TK, begin_TK, -1),
            choice_N=choice_N,
            group_sizes_P=jnp.diff(ends_P, prepend=jnp.zeros_like(ends_P[:1])),
            served_TK=is_kept_TK,
        )

    def choices_to_rows(self, values_TK: jax.Array) -> jax.Array:
        """[N]: the value of each row's choice, 0 for an empty row."""
        return _take_or_zero(values_TK.reshape(-1), self.choice_N)

    def rows_to_choices(self, values_N: jax.Array) -> jax.Array:
        """[T, K]: the value of each choice's row, 0 where it has none of its own."""
        return _take_or_zero(values_N, self.position_TK)


@checked(RULES)
def make_plan(
    dest_TK: jax.Array, num_destinations: int, bucket_rows: int | None = None, *, unique: bool = False
) -> DispatchPlan:
    """Order the choices of all tokens by destination, stably (token by token, choice by choice).

    Args:
      dest_TK: int32 destinations; -1 is none. Values out of range are treated as -1 and counted.
      num_destinations: P.
      bucket_rows: None packs all rows: N = T * K, sorted by destination, empty rows last. B gives every
        destination its own B rows: N = P * B, destination p owns rows p * B .. p * B + B - 1; what does not
        fit is clipped, the first in token order stay.
      unique: choices of one token with the same destination share one row, that of the first of them.

    Raises:
      ValueError: wrong rank or dtype, P or B not positive, or 2**31 destinations or rows and more.
    """
    T, K = dest_TK.shape
    P, M = num_destinations, T * K
    require(K >= 1, "dest_TK", dest_TK, "must have at least one choice per token [T, K]")
    N = M if bucket_rows is None else P * bucket_rows
    require(N < MAX_ELEMENTS, "bucket_rows", bucket_rows, f"times num_destinations ({P}) must be below 2**31")
    dest_TK = _as_int32(dest_TK)
    if M == 0:
        return _empty_plan(dest_TK, P, N)
    by_xla = functools.partial(_plan_by_xla, P=P, bucket_rows=bucket_rows, unique=unique)
    library = functools.partial(_plan_by_library, P=P, N=N, bucket_rows=bucket_rows, unique=unique)
    return native.by_platform(
        (dest_TK,),
        cpu=functools.partial(library, workspace=0),
        cuda=functools.partial(library, workspace=_cuda_workspace(M, P))
        if P <= _CUDA_MAX_DESTINATIONS
        else by_xla,
        otherwise=by_xla,
    )


def _as_int32(dest_TK: jax.Array) -> jax.Array:
    """The destinations as the ops take them; what int32 does not hold stays out of range, and is counted."""
    dest_TK = jnp.asarray(dest_TK)
    limits, own = jnp.iinfo(jnp.int32), jnp.iinfo(dest_TK.dtype)
    if own.min < limits.min:
        dest_TK = jnp.maximum(dest_TK, limits.min)
    if own.max > limits.max:
        dest_TK = jnp.minimum(dest_TK, limits.max)
    return dest_TK.astype(jnp.int32)


def _cuda_workspace(M: int, P: int) -> int:
    """Numbers that the CUDA kernels write to count M choices in chunks, side by side; see csrc/plan.cu."""
    chunks = max(1, min(-(-M // 128), _CUDA_MAX_CHUNKS, _CUDA_MAX_COUNTERS // P))
    return P * chunks + P + chunks


def _plan_by_library(
    dest_TK, *, P: int, N: int, bucket_rows: int | None, unique: bool, workspace: int
) -> DispatchPlan:
    results = [
        jax.ShapeDtypeStruct(dest_TK.shape, jnp.int32),
        jax.ShapeDtypeStruct((N,), jnp.int32),
        jax.ShapeDtypeStruct((P,), jnp.int32),
        jax.ShapeDtypeStruct(dest_TK.shape, jnp.bool_),
        jax.ShapeDtypeStruct((), jnp.int32),
        jax.ShapeDtypeStruct((workspace,), jnp.int32),
    ]
    attributes = {"bucket_rows": np.int64(-1 if bucket_rows is None else bucket_rows), "unique": unique}
    position_TK, choice_N, sizes_P, served_TK, num_invalid, _ = native.call(
        "moejax_make_plan", results, dest_TK, **attributes
    )
    return DispatchPlan(position_TK, choice_N, sizes_P, served_TK, num_invalid, dest_TK.shape[1])


def _plan_by_xla(dest_TK, *, P: int, bucket_rows: int | None, unique: bool) -> DispatchPlan:
    T, K = dest_TK.shape
    M = T * K
    valid_TK = (dest_TK >= 0) & (dest_TK < P)
    num_invalid = jnp.sum(~valid_TK & (dest_TK != -1), dtype=jnp.int32)
    dest_TK = jnp.where(valid_TK, dest_TK, P)
    first_TK = _first_same_destination(dest_TK) if unique else lax.broadcasted_iota(jnp.int32, (T, K), 1)
    # Only the first of a token's equal choices has a row; P stands for "no row" from here on.
    dest_M = jnp.where(first_TK == lax.broadcasted_iota(jnp.int32, (T, K), 1), dest_TK, P).reshape(M)

    order = _order_by_counting if P <= _COUNTING_MAX_DESTINATIONS else _order_by_sorting
    slot_M, choice_M, counts_P = order(dest_M, P)
    starts_P = jnp.cumsum(counts_P, dtype=jnp.int32) - counts_P
    if bucket_rows is None:
        position_M = jnp.where(dest_M < P, slot_M, -1)
        choice_N = jnp.where(lax.iota(jnp.int32, M) < jnp.sum(counts_P), choice_M, -1)
        group_sizes_P = counts_P
    else:
        rank_M = slot_M - _take(starts_P, jnp.minimum(dest_M, P - 1))
        kept_M = (dest_M < P) & (rank_M < bucket_rows)
        position_M = jnp.where(kept_M, dest_M * bucket_rows + rank_M, -1)
        group_sizes_P = jnp.minimum(counts_P, bucket_rows)
        row_PB = lax.broadcasted_iota(jnp.int32, (P, bucket_rows), 1)
        source_PB = jnp.minimum(starts_P[:, None] + row_PB, M - 1)
        choice_N = jnp.where(row_PB < group_sizes_P[:, None], _take(choice_M, source_PB), -1).reshape(-1)

    position_TK = position_M.reshape(T, K)
    served_TK = valid_TK & (jnp.take_along_axis(position_TK, first_TK, axis=1) >= 0)
    return DispatchPlan(position_TK, choice_N, group_sizes_P, served_TK, num_invalid, K)


def _step(total: jax.Array, count: int) -> jax.Array:
    """Share count / total as u32 in units of 2**-32, rounded down; 0 stands for 1: all rows fit."""
    share = jnp.float32(count * (1 - 2**-22)) / jnp.maximum(total, 1).astype(jnp.float32)
    step = jnp.maximum((jnp.minimum(share, 1 - 2**-24) * 2.0**32).astype(jnp.uint32), jnp.uint32(1))
    return jnp.where(total <= count, jnp.uint32(0), step)


def _kept_before(step: jax.Array, row: jax.Array) -> jax.Array:
    """ceil(row * step / 2**32), i32: how many of the first rows are kept, of any at least the first one."""
    number = row.astype(jnp.uint32)
    low, high = number & 0xFFFF, number >> 16
    step_low, step_high = step & 0xFFFF, step >> 16
    # The upper word of a product of 32 x 32 bits, from products of 16 x 16.
    middle = high * step_low + ((low * step_low) >> 16)
    carry = (middle & 0xFFFF) + low * step_high
    upper = high * step_high + (middle >> 16) + (carry >> 16) + (number * step != 0)
    return jnp.where(step == 0, row, upper.astype(jnp.int32))


def _empty_plan(dest_TK: jax.Array, P: int, N: int) -> DispatchPlan:
    def zeros(shape):
        return vary_like(jnp.zeros(shape, jnp.int32), dest_TK)

    return DispatchPlan(
        dest_TK, zeros((N,)) - 1, zeros((P,)), zeros(dest_TK.shape) > 0, zeros(()), dest_TK.shape[1]
    )


def _first_same_destination(dest_TK: jax.Array) -> jax.Array:
    """For each choice the first k of its token with the same destination, int32 [T, K]."""
    same_TKK = dest_TK[:, :, None] == dest_TK[:, None, :]
    return jnp.argmax(same_TKK, axis=-1).astype(jnp.int32)


def _take_or_zero(table: jax.Array, index: jax.Array) -> jax.Array:
    if table.shape[0] == 0:
        return jnp.zeros(index.shape, table.dtype)
    return jnp.where(index >= 0, _take(table, jnp.maximum(index, 0)), 0)


def _take(table: jax.Array, index: jax.Array) -> jax.Array:
    return table.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _order_by_sorting(dest_M: jax.Array, P: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Stable order of the choices by destination (P sorts last).

    Returns slot_M (sorted place of each choice), choice_M (choice at each sorted place), counts_P.
    """
    M = dest_M.shape[0]
    iota_M = lax.iota(jnp.int32, M)
    if (P + 1) * M < MAX_ELEMENTS:
        # Unique keys make an unstable one-operand sort stable; it takes a third of the time of two operands.
        key_M = lax.sort(dest_M * M + iota_M, is_stable=False)
        sorted_M, choice_M = key_M // M, key_M % M
    else:
        sorted_M, choice_M = lax.sort((dest_M, iota_M), num_keys=1, is_stable=True)
    slot_M = (
        jnp.zeros_like(iota_M)
        .at[choice_M]
        .set(iota_M, unique_indices=True, mode="promise_in_bounds", wrap_negative_indices=False)
    )
    ends_P = jnp.searchsorted(sorted_M, lax.iota(jnp.int32, P), side="right").astype(jnp.int32)
    return slot_M, choice_M, jnp.diff(ends_P, prepend=jnp.zeros_like(ends_P[:1]))


def _order_by_counting(dest_M: jax.Array, P: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `_order_by_sorting`; slots of choices with destination P are M, their places in choice_M hold 0."""
    M = dest_M.shape[0]
    lanes = -(-M // _COUNTING_STEPS)
    steps = -(-M // lanes)
    dest_CS = jnp.pad(dest_M, (0, lanes * steps - M), constant_values=P).reshape(lanes, steps)

    def step(seen_CP, dest_C):
        here_CP = dest_C[:, None] == lax.broadcasted_iota(jnp.int32, (1, P), 1)
        return seen_CP + here_CP, jnp.sum(jnp.where(here_CP, seen_CP, 0), axis=1, dtype=jnp.int32)

    seen_CP, rank_SC = lax.scan(step, vary_like(jnp.zeros((lanes, P), jnp.int32), dest_M), dest_CS.T)
    counts_P = jnp.sum(seen_CP, axis=0, dtype=jnp.int32)
    # A lane's first row of destination p comes after all smaller destinations and all earlier lanes.
    starts_P = jnp.cumsum(counts_P, dtype=jnp.int32) - counts_P
    starts_CP = starts_P[None, :] + jnp.cumsum(seen_CP, axis=0, dtype=jnp.int32) - seen_CP
    starts_M = jnp.take_along_axis(starts_CP, jnp.minimum(dest_CS, P - 1), axis=1)
    slot_M = jnp.where(dest_CS < P, starts_M + rank_SC.T, M).reshape(-1)[:M]
    choice_M = (
        jnp.zeros_like(slot_M)
        .at[slot_M]
        .set(lax.iota(jnp.int32, M), unique_indices=False, mode="drop", wrap_negative_indices=False)
    )
    return slot_M, choice_M, counts_P
