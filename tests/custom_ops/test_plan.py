import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ops import make_plan, native, reference

FIELDS = ("position_TK", "choice_N", "group_sizes_P", "served_TK", "num_invalid")

# Each case is a destination table; P = 4. Most share a shape, and so their compiled programs.
CASES = {
    "random": np.random.default_rng(0).integers(-2, 6, (13, 3)),
    "one takes all": np.full((13, 3), 2),
    "all -1": np.full((13, 3), -1),
    "extreme integers": np.random.default_rng(1).choice([2**31 - 1, -(2**31), 4, 3], (13, 3)),
    "no token": np.zeros((0, 3)),
    "one token": np.array([[3, 3, 0]]),
}


@pytest.fixture(params=["native", "xla"], autouse=True)
def path(request):
    """Every test runs on the compiled library and on plain XLA."""
    assert native.cpu_library() is not None
    with native.disabled() if request.param == "xla" else contextlib.nullcontext():
        yield request.param


def compiled(make, P, B, unique):
    return _compiled(native.cpu_library() is None, make, P, B, unique)


@functools.lru_cache
def _compiled(_without_library, make, P, B, unique):
    return jax.jit(lambda dest: make(dest, P, B, unique=unique))


def plan_with(make, dest, P, B, unique):
    return compiled(make, P, B, unique)(jnp.asarray(dest, jnp.int32))


def assert_same_plan(actual, expected):
    for field in FIELDS:
        got, want = getattr(actual, field), getattr(expected, field)
        assert got.dtype == want.dtype, field
        np.testing.assert_array_equal(got, want, err_msg=field)
    assert actual.num_choices == expected.num_choices


class PlanConformance:
    """What every implementation of make_plan has to do, on every platform."""

    @pytest.mark.parametrize("unique", [False, True], ids=["each", "unique"])
    @pytest.mark.parametrize("bucket_rows", [None, 2, 9])
    @pytest.mark.parametrize("case", CASES)
    def test_matches_the_specification(self, case, bucket_rows, unique):
        plans = [
            plan_with(make, CASES[case], 4, bucket_rows, unique) for make in (make_plan, reference.make_plan)
        ]
        assert_same_plan(*plans)

    # More than one chunk of the library's counting, and more destinations than choices of a chunk.
    @pytest.mark.parametrize(
        "T, K, P",
        [
            (40_000, 1, 4096),
            (70_001, 1, 1),
            pytest.param(1 << 20, 16, 64, marks=pytest.mark.slow),
            pytest.param(100_003, 3, 4096, marks=pytest.mark.slow),
        ],
    )
    def test_many_choices_are_sorted_stably(self, T, K, P):
        dest = np.random.default_rng(4).integers(-1, P + 1, (T, K)).astype(np.int32)
        plan = plan_with(make_plan, dest, P, None, False)
        flat = dest.reshape(-1)
        valid = np.flatnonzero((flat >= 0) & (flat < P))
        order = valid[np.argsort(flat[valid], kind="stable")]
        np.testing.assert_array_equal(plan.choice_N[: len(order)], order)
        assert (np.asarray(plan.choice_N[len(order) :]) == -1).all()
        np.testing.assert_array_equal(plan.group_sizes_P, np.bincount(flat[valid], minlength=P))
        assert int(plan.num_invalid) == (flat == P).sum()

    def test_many_choices_in_full_buckets(self):
        dest = np.random.default_rng(4).integers(-1, 4, (9_000, 4))
        assert_same_plan(
            *[plan_with(make, dest, 3, 2_500, True) for make in (make_plan, reference.make_plan)]
        )

    def test_repeats_bitwise(self):
        dest = np.random.default_rng(9).integers(-1, 129, (8192, 8))
        first = plan_with(make_plan, dest, 128, None, True)
        for _ in range(49):
            assert_same_plan(plan_with(make_plan, dest, 128, None, True), first)

    # Below and above the change from counting to sorting; and keys too large for one 31-bit sort operand.
    @pytest.mark.parametrize("shape, P", [((700, 3), 7), ((700, 3), 50), ((1500, 1), 2**21)])
    def test_both_orders_match_a_stable_argsort(self, shape, P):
        dest = np.random.default_rng(1).integers(0, P, shape)
        plan = plan_with(make_plan, dest, P, None, False)
        np.testing.assert_array_equal(plan.choice_N, np.argsort(dest.reshape(-1), kind="stable"))
        np.testing.assert_array_equal(plan.group_sizes_P, np.bincount(dest.reshape(-1), minlength=P))
        np.testing.assert_array_equal(plan.choice_N[plan.position_TK.reshape(-1)], np.arange(dest.size))

    def test_by_hand(self):
        # Token 0 sends both choices to 1; the bucket of destination 1 is full after two rows.
        dest = jnp.asarray([[1, 1], [0, 7], [1, -1], [1, 0]], jnp.int32)
        plan = plan_with(make_plan, dest, 2, 2, True)
        np.testing.assert_array_equal(plan.position_TK, [[2, -1], [0, -1], [3, -1], [-1, 1]])
        np.testing.assert_array_equal(plan.choice_N, [2, 7, 0, 4])
        np.testing.assert_array_equal(plan.token_N, [1, 3, 0, 2])
        np.testing.assert_array_equal(plan.group_sizes_P, [2, 2])
        np.testing.assert_array_equal(
            plan.served_TK, [[True, True], [True, False], [True, False], [False, True]]
        )
        assert plan.num_invalid == 1

    def test_unique_choices_are_served_only_with_their_shared_row(self):
        plan = plan_with(make_plan, [[0, 0], [0, 0]], 1, 1, True)
        np.testing.assert_array_equal(plan.served_TK, [[True, True], [False, False]])
        np.testing.assert_array_equal(plan.choice_N, [0])

    @settings(deadline=None, max_examples=25)
    @given(
        st.lists(st.tuples(*[st.integers(-2, 5)] * 3), min_size=1, max_size=13),
        st.sampled_from([None, 2, 9]),
        st.booleans(),
    )
    def test_drawn_tables_match_the_specification(self, rows, bucket_rows, unique):
        dest = np.full((13, 3), -1)  # the shape of CASES, compiled there
        dest[: len(rows)] = rows
        assert_same_plan(
            *[plan_with(make, dest, 4, bucket_rows, unique) for make in (make_plan, reference.make_plan)]
        )

    def test_vmap_equals_one_by_one(self):
        dest = jnp.asarray(np.random.default_rng(2).integers(-1, 4, (3, 6, 2)), jnp.int32)
        many = jax.jit(jax.vmap(lambda d: make_plan(d, 4, 3)))(dest)
        for i in range(3):
            one = plan_with(make_plan, dest[i], 4, 3, False)
            for field in FIELDS:
                np.testing.assert_array_equal(getattr(many, field)[i], getattr(one, field))

    @pytest.mark.parametrize("check_vma", [True, False])
    @pytest.mark.parametrize("P", [4, 40], ids=["counting", "sorting"])
    def test_inside_shard_map(self, P, check_vma):
        if jax.device_count() < 4:
            pytest.skip("needs four devices")
        mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        dest = jnp.asarray(np.random.default_rng(3).integers(-1, P, (4 * 6, 2)), jnp.int32)

        def body(d):
            plan = make_plan(d, P, 2, unique=True)
            return plan.position_TK, plan.choice_N

        spec = jax.P("expert")
        sharded = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=(spec, spec), check_vma=check_vma)
        position, choice = jax.jit(sharded)(dest)
        for i in range(4):
            plan = plan_with(make_plan, dest[6 * i : 6 * i + 6], P, 2, True)
            np.testing.assert_array_equal(position[6 * i : 6 * i + 6], plan.position_TK)
            np.testing.assert_array_equal(choice[2 * P * i : 2 * P * (i + 1)], plan.choice_N)


class TestPlan(PlanConformance):
    pass


def test_plan_is_a_pytree_with_static_choices():
    plan = plan_with(make_plan, np.zeros((3, 2)), 2, None, False)
    leaves, treedef = jax.tree.flatten(plan)
    assert len(leaves) == len(FIELDS)
    assert jax.tree.unflatten(treedef, leaves).num_choices == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.num_choices = 3


@pytest.mark.parametrize(
    "dest, P, B, words",
    [
        (jnp.zeros((3,), jnp.int32), 2, None, ("dest_TK", "array [T, K]", "[3]")),
        (jnp.zeros((3, 1), jnp.float32), 2, None, ("dest_TK", "integer", "float32")),
        (jnp.zeros((3, 0), jnp.int32), 2, None, ("dest_TK", "at least one choice")),
        (jnp.zeros((3, 1), jnp.int32), 0, None, ("num_destinations", "at least 1", "0")),
        (jnp.zeros((3, 1), jnp.int32), 2**31, None, ("num_destinations", "at most 2147483647", "2147483648")),
        (jnp.zeros((3, 1), jnp.int32), 2, 0, ("bucket_rows", "at least 1", "0")),
        (jnp.zeros((3, 1), jnp.int32), 2**16, 2**15, ("bucket_rows", "2**31")),
    ],
)
def test_refuses(dest, P, B, words):
    with pytest.raises(ValueError) as error:
        make_plan(dest, P, B)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("count", "sizes"), [(4, [3, 0, 1]), (1, [5, 9, 0]), (37, [200, 0, 40]), (200, [50, 3, 2])]
)
def test_too_many_rows_are_cut_by_the_same_share_everywhere(count, sizes):
    dest = np.random.default_rng(2).permutation(np.repeat(np.arange(3), sizes))
    dest = np.append(dest, -1)[:, None]
    whole = make_plan(jnp.asarray(dest, jnp.int32), 3)
    plan = jax.jit(lambda dest: make_plan(dest, 3).at_most(count))(jnp.asarray(dest, jnp.int32))
    total = sum(sizes)
    kept = np.asarray(plan.group_sizes_P)
    assert kept.sum() == min(count, total) == np.sum(plan.served_TK)
    np.testing.assert_array_less(np.abs(kept - np.asarray(sizes) * min(1, count / total)), 1)
    rows = np.asarray(plan.choice_N)
    assert len(rows) == min(count, len(dest)) and (rows[kept.sum() :] == -1).all()
    position = np.asarray(plan.position_TK).reshape(-1)
    np.testing.assert_array_equal(position[rows[: kept.sum()]], np.arange(kept.sum()))
    np.testing.assert_array_equal(plan.served_TK, plan.position_TK >= 0)
    # In the order they had, at distances that differ by one at most.
    before = np.asarray(whole.position_TK).reshape(-1)[rows[: kept.sum()]]
    assert before[0] == 0 and (len(before) < 3 or np.ptp(np.diff(before)) <= 1)


def test_the_share_that_is_kept_is_exact_beyond_32_bits():
    from custom_ops.plan import _kept_before, _step

    for total, count in ((2**31 - 1, 2**21 + 5), (600_000, 524_288), (2**20, 3)):
        step = _step(jnp.int32(total), count)
        rows = np.unique(np.linspace(0, total, 1001).astype(np.int32))
        exact = -(-rows.astype(object) * int(step) // 2**32)
        np.testing.assert_array_equal(_kept_before(step, jnp.asarray(rows)), exact.astype(np.int32))
        assert count - 1 <= exact[-1] <= count


@pytest.mark.parametrize("dtype", [jnp.int64, jnp.uint64, jnp.uint32, jnp.uint8], ids=str)
def test_destinations_of_other_integer_types_do_not_wrap_around(dtype):
    """2**32 + 1 is no destination, and the largest unsigned number is not -1."""
    with jax.enable_x64(True):
        largest = jnp.iinfo(dtype).max
        wraps = [v for v in (2**32 + 1, largest) if v <= largest]
        dest = jnp.asarray(np.array([[1, v] for v in wraps], np.dtype(dtype)))
        plan = make_plan(dest, 2)
        np.testing.assert_array_equal(plan.group_sizes_P, [0, len(wraps)])
        assert int(plan.num_invalid) == len(wraps)
