"""The compiled CPU ops on drawn cases, against loops over tokens, choices and groups in NumPy.

Shapes: T tokens, K choices, P destinations, N rows, D and F widths, E groups.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ops import (
    grouped_matmul,
    grouped_matmul_dlhs,
    grouped_matmul_drhs,
    make_plan,
    native,
    permute,
    unpermute,
)
from tests import tolerance
from tests.tolerance import assert_close

BOUNDS = {
    "float32": tolerance.F32,
    "float64": tolerance.F64,
    "bfloat16": tolerance.BF16,
    "float16": tolerance.F16,
}
DTYPES = st.sampled_from(sorted(BOUNDS))
WIDTHS = st.sampled_from([1, 7, 64, 100])


def naive_plan(dest, P, bucket_rows, unique):
    """(position_TK, choice_N, sizes_P, served_TK, invalid), one choice after the other."""
    T, K = dest.shape
    rows_of = [[] for _ in range(P)]
    row_in = np.full((T, K), -1)
    served, invalid = np.zeros((T, K), bool), 0
    for t in range(T):
        for k in range(K):
            p = dest[t, k]
            if not 0 <= p < P:
                invalid += p != -1
                continue
            earlier = [j for j in range(k) if dest[t, j] == p] if unique else []
            if earlier:
                served[t, k] = served[t, earlier[0]]
            elif bucket_rows is None or len(rows_of[p]) < bucket_rows:
                row_in[t, k] = len(rows_of[p])
                rows_of[p].append(t * K + k)
                served[t, k] = True
    sizes = np.array([len(rows) for rows in rows_of])
    starts = np.cumsum(sizes) - sizes if bucket_rows is None else np.arange(P) * bucket_rows
    choice = np.full(T * K if bucket_rows is None else P * bucket_rows, -1)
    position = np.full((T, K), -1)
    for p, rows in enumerate(rows_of):
        for i, m in enumerate(rows):
            choice[starts[p] + i] = m
            position[m // K, m % K] = starts[p] + i
    return position, choice, sizes, served, invalid


@st.composite
def tables(draw):
    """Destinations, of which some are -1 or out of range, for any number of tokens and up to 16 choices."""
    T, K, P = draw(st.integers(1, 12)), draw(st.integers(1, 16)), draw(st.sampled_from([1, 2, 5, 33, 4096]))
    kind = draw(st.sampled_from(["any", "one takes all", "none"]))
    seed = draw(st.integers(0, 2**16))
    dest = np.random.default_rng(seed).integers(-2, P + 1, (T, K))
    if kind != "any":
        dest = np.full((T, K), P - 1 if kind == "one takes all" else -1)
    return dest, P, draw(st.sampled_from([None, 1, 3])), draw(st.booleans())


@settings(deadline=None, max_examples=40)
@given(tables(), WIDTHS, DTYPES, st.booleans())
def test_plan_permute_and_unpermute(table, D, dtype, poison):
    assert native.cpu_library() is not None
    dest, P, bucket_rows, unique = table
    plan = make_plan(jnp.asarray(dest, jnp.int32), P, bucket_rows, unique=unique)
    position, choice, sizes, served, invalid = naive_plan(dest, P, bucket_rows, unique)
    for got, want in (
        (plan.position_TK, position),
        (plan.choice_N, choice),
        (plan.group_sizes_P, sizes),
        (plan.served_TK, served),
        (plan.num_invalid, invalid),
    ):
        np.testing.assert_array_equal(got, want)

    (T, K), N = dest.shape, len(choice)
    with jax.enable_x64(dtype == "float64"):
        draw = np.random.default_rng(D).standard_normal
        x, weights = jnp.asarray(draw((T, D)), dtype), jnp.asarray(draw((T, K)), dtype)
        rows = jnp.asarray(draw((N, D)), dtype)
        if poison:
            rows = jnp.where((choice < 0)[:, None], jnp.nan, rows)
        moved = permute(x, plan)
        value, pullback = jax.vjp(lambda r, w: unpermute(r, plan, w), rows, weights)
        drows, dweights = pullback(x)
    x64, weights64, rows64 = (np.asarray(a, np.float64) for a in (x, weights, rows))
    expected = {
        name: np.zeros(shape) for name, shape in (("moved", (N, D)), ("drows", (N, D)), ("y", (T, D)))
    }
    expected_dweights = np.zeros((T, K))
    for n in np.flatnonzero(choice >= 0):
        t, k = divmod(choice[n], K)
        expected["moved"][n] = x64[t]
        expected["drows"][n] = weights64[t, k] * x64[t]
        expected["y"][t] += weights64[t, k] * rows64[n]
        expected_dweights[t, k] = rows64[n] @ x64[t]
    np.testing.assert_array_equal(np.asarray(moved, np.float64), expected["moved"])
    assert value.dtype == drows.dtype == dweights.dtype == x.dtype
    assert_close(np.asarray(value, np.float64), expected["y"], BOUNDS[dtype], "y")
    assert_close(np.asarray(drows, np.float64), expected["drows"], BOUNDS[dtype], "drows")
    assert_close(np.asarray(dweights, np.float64), expected_dweights, BOUNDS[dtype], "dweights")


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 9), WIDTHS, WIDTHS, DTYPES)
def test_grouped_products(sizes, tail, D, F, dtype):
    N, E = sum(sizes) + tail, len(sizes)
    with jax.enable_x64(dtype == "float64"):
        draw = np.random.default_rng(E).standard_normal
        rows, w, dout = (jnp.asarray(draw(shape), dtype) for shape in ((N, D), (E, D, F), (N, F)))
        poisoned = [a.at[sum(sizes) :].set(jnp.nan) for a in (rows, dout)]
        groups = jnp.asarray(sizes, jnp.int32)
        actual = (
            grouped_matmul(poisoned[0], w, groups, implementation="native"),
            grouped_matmul_dlhs(poisoned[1], w, groups, implementation="native"),
            grouped_matmul_drhs(*poisoned, groups, implementation="native"),
        )
    rows, w, dout = (np.asarray(a, np.float64) for a in (rows, w, dout))
    expected = np.zeros((N, F)), np.zeros((N, D)), np.zeros((E, D, F))
    start = 0
    for e, size in enumerate(sizes):
        own = slice(start, start + size)
        expected[0][own], expected[1][own] = rows[own] @ w[e], dout[own] @ w[e].T
        expected[2][e] = rows[own].T @ dout[own]
        start += size
    for got, want, name in zip(actual, expected, ("out", "drows", "dw"), strict=True):
        assert got.dtype == dtype
        assert_close(np.asarray(got, np.float64), want, BOUNDS[dtype], name)


@pytest.mark.parametrize("E", [1, 4096])
def test_one_group_and_more_groups_than_rows(E):
    draw = np.random.default_rng(0)
    sizes = np.zeros(E, np.int32)
    np.add.at(sizes, draw.integers(0, E, 300), 1)
    rows, w = draw.standard_normal((310, 5)), draw.standard_normal((E, 5, 3))
    got = grouped_matmul(
        *(jnp.asarray(a, jnp.float32) for a in (rows, w)), jnp.asarray(sizes), implementation="native"
    )
    group_N = np.repeat(np.arange(E), sizes)
    want = np.concatenate([np.einsum("nd,ndf->nf", rows[:300], w[group_N]), np.zeros((10, 3))])
    assert_close(np.asarray(got, np.float64), want, tolerance.F32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_numbers_become_f32_and_are_rounded_back_as_ieee_says(dtype):
    """Every number of 16 bits: subnormal, infinite, NaN; and products, which have more digits."""
    every = jnp.asarray(np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype)))
    plan = make_plan(jnp.zeros((2**16, 1), jnp.int32), 1)
    same = unpermute(every[:, None], plan)[:, 0]
    np.testing.assert_array_equal(jnp.isnan(same), jnp.isnan(every))
    # NaN may change its bits. What f32 itself holds as a subnormal number is flushed to 0 by XLA's threads or not.
    wide = np.asarray(every, np.float32)
    there = (np.abs(wide) >= 2.0**-126) | (wide == 0)
    np.testing.assert_array_equal(
        np.asarray(same).view(np.uint16)[there] & 0x7FFF, np.asarray(every).view(np.uint16)[there] & 0x7FFF
    )
    # Products of two numbers hold more digits than 16 bits do, and leave the range on both sides.
    factors = jnp.asarray(
        np.random.default_rng(3).permutation(2**16).astype(np.uint16).view(jnp.dtype(dtype))
    )
    rounded = permute(every[:, None], plan, factors[:, None])[:, 0]
    with np.errstate(all="ignore"):
        exact = np.asarray(every, np.float32) * np.asarray(factors, np.float32)
        want = exact.astype(jnp.dtype(dtype)).astype(np.float32)
    flushed = [(np.abs(a) < 2.0**-126) & (a != 0) for a in (wide, np.asarray(factors, np.float32), exact)]
    kept = ~np.any(flushed, axis=0)
    np.testing.assert_array_equal(np.asarray(rounded, np.float32)[kept], want[kept])
