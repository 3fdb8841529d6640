"""What stands around the Mosaic kernels, tried without them: a stand-in does with blocks of rows what they do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

from custom_ops import grouped_matmul_mosaic, reference
from custom_ops.grouped_matmul_guard import clean_shared_blocks, spoil_groups, zero_tail
from tests import tolerance
from tests.tolerance import assert_close

N, D, F = 300, 5, 140
# Blocks of 64 rows: within one, at its border, over several, empty, and a tail that begins within a block.
SIZES = {
    "several in a block": (10, 20, 0, 60, 38, 100),
    "at borders": (64, 128, 0, 64),
    "one, not whole": (299,),
    "no row": (0, 0),
    "more than there are": (70, 200, 60, 5),
}


def by_blocks(lhs, rhs, *, group_sizes, block_k, **tiles):
    """As jax's kernel: blocks that a group has rows in, neighbours' rows of lhs times 0, those of rhs as they are."""
    rows = jnp.arange(lhs.shape[0])
    results, end = [], jnp.int32(0)
    for e in range(group_sizes.shape[0]):
        start, size, end = end, group_sizes[e], end + group_sizes[e]
        read = (rows >= start // block_k * block_k) & (rows < -(-end // block_k) * block_k) & (size > 0)
        own = (rows >= start) & (rows < end)
        masked = jnp.where(read[:, None], lhs * own[:, None].astype(lhs.dtype), 0)
        results.append(masked.T.astype(jnp.float32) @ jnp.where(read[:, None], rhs, 0).astype(jnp.float32))
    return jnp.stack(results).astype(lhs.dtype)


@pytest.fixture
def drhs(monkeypatch):
    monkeypatch.setattr(transposed_ragged_dot_mgpu, "transposed_ragged_dot", by_blocks)
    monkeypatch.setattr(grouped_matmul_mosaic, "_require_fit", lambda *_: None)
    monkeypatch.setitem(grouped_matmul_mosaic._TILES, "block_n", 1)
    return jax.jit(functools.partial(grouped_matmul_mosaic.drhs, dtype=jnp.float32))


def operands(name):
    draw = np.random.default_rng(4).standard_normal
    sizes = jnp.asarray(SIZES[name], jnp.int32)
    return jnp.asarray(draw((N, D)), jnp.float32), jnp.asarray(draw((N, F)), jnp.float32), sizes


@pytest.mark.parametrize("name", SIZES)
def test_weight_gradients(drhs, name):
    rows, dout, sizes = operands(name)
    tail = (jnp.arange(N) >= sizes.sum())[:, None]
    got = drhs(jnp.where(tail, jnp.nan, rows), jnp.where(tail, jnp.inf, dout), sizes)
    ends = np.minimum(np.cumsum(sizes), N)
    cut = jnp.asarray(np.diff(ends, prepend=0), jnp.int32)
    assert_close(got, reference.grouped_matmul_drhs(rows, dout, cut), tolerance.F32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["several in a block", "one, not whole"])
def test_a_bad_row_stays_in_its_group(drhs, name, value):
    rows, dout, sizes = operands(name)
    clean = drhs(rows, dout, sizes)
    group_N = np.searchsorted(np.cumsum(sizes), np.arange(N), side="right")
    for row in (0, 9, 10, 29, 30, 63, 64, 89, 90, 127, 128, 191, 192, 227):
        for dirty in (
            drhs(rows.at[row, 2].set(value), dout, sizes),
            drhs(rows, dout.at[row, 131].set(value), sizes),
        ):
            others = np.arange(len(sizes)) != group_N[row]
            np.testing.assert_array_equal(dirty[others], clean[others], err_msg=str(row))
            assert not np.isfinite(dirty[group_N[row]]).all(), row


def test_only_what_is_shared_and_not_finite_is_touched():
    rows, _, sizes = operands("several in a block")
    bad = rows.at[:, 1].set(jnp.nan)
    cleaned, groups = clean_shared_blocks(bad, sizes, 64)
    # Groups begin within the blocks 0 and 1; the last group begins at the border of block 2 and is alone there.
    expected = np.where((np.arange(N) < 128)[:, None] & np.isnan(bad), 0, bad)
    np.testing.assert_array_equal(cleaned, expected)
    np.testing.assert_array_equal(groups, [True, True, False, True, True, False])
    np.testing.assert_array_equal(zero_tail(rows, sizes), jnp.where(jnp.arange(N)[:, None] < 228, rows, 0))


def test_spoils_the_named_groups_whole():
    matrices = jnp.ones((3, 130, 140), jnp.bfloat16)
    got = spoil_groups(matrices, jnp.asarray([False, True, False]))
    np.testing.assert_array_equal(jnp.isnan(got).all(axis=(1, 2)), [False, True, False])
    np.testing.assert_array_equal(got[::2], matrices[::2])


def test_under_jit_and_shard_map():
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, _, sizes = operands("several in a block")
    many_rows = jnp.concatenate([rows.at[70 * i].set(jnp.nan) for i in range(4)])

    def body(rows, sizes):
        return clean_shared_blocks(zero_tail(rows, sizes), sizes, 64)

    spec = jax.P("expert")
    sharded = jax.shard_map(body, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, spec), check_vma=False)
    got_rows, got_groups = jax.jit(sharded)(many_rows, jnp.tile(sizes, 4))
    for i in range(4):
        want_rows, want_groups = body(rows.at[70 * i].set(jnp.nan), sizes)
        np.testing.assert_array_equal(got_rows[N * i : N * i + N], want_rows)
        np.testing.assert_array_equal(got_groups[6 * i : 6 * i + 6], want_groups)
