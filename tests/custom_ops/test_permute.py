import contextlib
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import custom_ops
from custom_ops import make_plan, native, reference
from tests import tolerance
from tests.tolerance import assert_close

# name: (destinations, P, bucket_rows, unique)
PLANS = {
    "packed": (np.random.default_rng(0).integers(-1, 5, (11, 3)), 5, None, False),
    "clipped": (np.random.default_rng(1).integers(-2, 6, (11, 3)), 5, 3, False),
    "unique": (np.random.default_rng(2).integers(-1, 3, (11, 4)), 3, 9, True),
    "one takes all": (np.full((6, 2), 1), 3, None, False),
    "all -1": (np.full((6, 2), -1), 3, 2, False),
    "one token": (np.array([[2, 2, 0]]), 3, None, False),
    "no token": (np.zeros((0, 2)), 3, 2, False),
}
DTYPES = {
    jnp.float32.dtype: tolerance.F32,
    jnp.float64.dtype: tolerance.F64,
    jnp.bfloat16.dtype: tolerance.BF16,
    jnp.float16.dtype: tolerance.F16,
}


@functools.lru_cache
def plan_of(name):
    dest, P, B, unique = PLANS[name]
    return jax.jit(lambda d: make_plan(d, P, B, unique=unique))(jnp.asarray(dest, jnp.int32))


def case(name, dtype=jnp.float32, D=5):
    plan = plan_of(name)
    draw = np.random.default_rng(7).standard_normal
    (T, K), (N,) = plan.position_TK.shape, plan.choice_N.shape
    x, rows, weights = draw((T, D)), draw((N, D)), draw((T, K))
    return plan, *(jnp.asarray(a, dtype) for a in (x, rows, weights))


def everything(ops, x, rows, weights, plan):
    """Values and gradients of both ops, without and with weights; one's cotangent is the other's payload."""
    results = {}
    for op, payload, cotangent in (("permute", x, rows), ("unpermute", rows, x)):
        function = getattr(ops, op)
        value, pullback = jax.vjp(lambda p, f=function: f(p, plan), payload)
        results[op] = (value, *pullback(cotangent))
        value, pullback = jax.vjp(lambda p, w, f=function: f(p, plan, w), payload, weights)
        results[op + " weighted"] = (value, *pullback(cotangent))
    return results


@pytest.fixture(params=["native", "xla"], autouse=True)
def path(request):
    """Every test runs on the compiled library and on plain XLA."""
    assert native.cpu_library() is not None
    with native.disabled() if request.param == "xla" else contextlib.nullcontext():
        yield request.param


def compiled(function, *static):
    return _compiled(native.cpu_library() is None, function, *static)


@functools.lru_cache
def _compiled(_without_library, function, *static):
    return jax.jit(lambda *operands: function(*static, *operands))


class PermuteConformance:
    """What every implementation of permute and unpermute has to do: `ops` has both functions."""

    ops: types.SimpleNamespace | types.ModuleType

    @pytest.mark.parametrize(
        "name, dtype",
        [(name, jnp.float32.dtype) for name in PLANS]
        + [
            (name, dtype)
            for name in ("packed", "unique")
            for dtype in (jnp.float64.dtype, jnp.bfloat16.dtype, jnp.float16.dtype)
        ],
        ids=str,
    )
    def test_values_and_gradients(self, name, dtype):
        plan = plan_of(name)
        with jax.enable_x64(dtype == jnp.float64):
            operands = case(name, dtype)[1:]
            actual = compiled(everything, self.ops)(*operands, plan)
        # The oracle gets the same numbers in f64, so the tolerance is the op's own rounding.
        with jax.enable_x64(True):
            expected = compiled(everything, reference)(*(a.astype(jnp.float64) for a in operands), plan)
        for op, results in actual.items():
            for part, got, want in zip(
                ("value", "d payload", "d weights"), results, expected[op], strict=False
            ):
                assert got.dtype == dtype
                assert_close(np.asarray(got, np.float64), want, DTYPES[dtype], f"{op}: {part}")

    @pytest.mark.parametrize("name", ["packed", "clipped", "unique"])
    def test_poison_stays_out(self, name):
        plan, x, rows, weights = case(name)
        empty, lost = plan.choice_N < 0, ~(plan.position_TK >= 0).any(axis=1)
        assert empty.any()
        bad_rows = jnp.where(empty[:, None], jnp.nan, rows)
        bad_x = jnp.where(lost[:, None], jnp.nan, x)
        clean = compiled(everything, self.ops)(x, rows, weights, plan)
        dirty = compiled(everything, self.ops)(bad_x, bad_rows, weights, plan)
        jax.tree.map(np.testing.assert_array_equal, dirty, clean)
        all_bad = compiled(everything, self.ops)(jnp.full_like(x, jnp.nan), rows, weights, plan)
        for op in ("permute", "permute weighted"):
            assert (all_bad[op][0][empty] == 0).all()

    def test_each_is_the_others_transpose(self):
        plan, x, rows, weights = case("clipped")
        results = compiled(everything, self.ops)(x, rows, weights, plan)
        for kind in ("", " weighted"):
            there, back = results["permute" + kind], results["unpermute" + kind]
            np.testing.assert_array_equal(there[1], back[0])
            np.testing.assert_array_equal(back[1], there[0])

    def test_integer_payload(self):
        plan, x, *_ = case("packed")
        for dtype in (jnp.int32, jnp.int8):
            ids = jnp.round(x * 40).astype(dtype)
            rows = self.ops.permute(ids, plan)
            assert rows.dtype == dtype
            np.testing.assert_array_equal(rows, reference.permute(ids, plan))

    def test_repeats_bitwise(self):
        plan, x, rows, weights = case("unique")
        first, *others = (compiled(everything, self.ops)(x, rows, weights, plan) for _ in range(50))
        for again in others:
            jax.tree.map(np.testing.assert_array_equal, again, first)

    def test_second_derivatives(self):
        plan, x, _, weights = case("clipped")

        def slope(ops):
            def loss(x, weights):
                return jnp.sum(ops.unpermute(jnp.sin(ops.permute(x, plan, weights)), plan, weights) ** 2)

            def squared(x, weights):
                return sum(jnp.sum(g**2) for g in jax.grad(loss, (0, 1))(x, weights))

            return jax.jit(jax.grad(squared, (0, 1)))(x, weights)

        for got, want in zip(slope(self.ops), slope(reference), strict=True):
            assert_close(got, want, tolerance.F32_MODEL)

    def test_under_remat_and_scan(self):
        plan, x, _, weights = case("clipped")

        def loss(ops, wrap):
            def layer(x, _):
                return ops.unpermute(jnp.sin(ops.permute(x, plan)), plan, weights), None

            return lambda x: jnp.sum(jax.lax.scan(wrap(layer), x, None, length=3)[0])

        got = jax.jit(jax.grad(loss(self.ops, jax.checkpoint)))(x)
        assert_close(got, jax.jit(jax.grad(loss(reference, lambda f: f)))(x), tolerance.F32)

    def test_under_vmap(self):
        plan, x, _, weights = case("packed")
        many = jnp.stack([x, 2 * x, -x])

        def loss(x):
            return jnp.sum(self.ops.unpermute(jnp.sin(self.ops.permute(x, plan)), plan, weights))

        batched, one = jax.jit(jax.vmap(jax.grad(loss)))(many), jax.jit(jax.grad(loss))
        for i in range(3):
            assert_close(batched[i], one(many[i]), tolerance.F32)

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_inside_shard_map(self, check_vma):
        """Four devices, each with a plan of its own; the same as four separate calls."""
        if jax.device_count() < 4:
            pytest.skip("needs four devices")
        mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        draw = np.random.default_rng(9)
        dest = jnp.asarray(draw.integers(-1, 3, (4 * 6, 2)), jnp.int32)
        x = jnp.asarray(draw.standard_normal((4 * 6, 5)), jnp.float32)
        weights = jnp.asarray(draw.standard_normal((4 * 6, 2)), jnp.float32)

        def body(dest, x, weights):
            plan = make_plan(dest, 3, 4)

            def loss(x, weights):
                return jnp.sum(jnp.sin(self.ops.unpermute(self.ops.permute(x, plan) ** 2, plan, weights)))

            return jax.grad(loss, (0, 1))(x, weights)

        spec = jax.P("expert")
        sharded = jax.shard_map(
            body, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec, spec), check_vma=check_vma
        )
        dx, dweights = jax.jit(sharded)(dest, x, weights)
        one = jax.jit(body)
        for i in range(4):
            here = slice(6 * i, 6 * i + 6)
            expected = one(dest[here], x[here], weights[here])
            assert_close(dx[here], expected[0], tolerance.F32)
            assert_close(dweights[here], expected[1], tolerance.F32)


class TestGathers(PermuteConformance):
    ops = custom_ops


def test_8_bit_floats_are_moved():
    """jax promotes them to nothing, so nothing may ask it to."""
    plan = plan_of("clipped")
    x = jnp.arange(55, dtype=jnp.float32).reshape(11, 5).astype(jnp.float8_e4m3fn)
    moved = custom_ops.permute(x, plan)
    assert moved.dtype == x.dtype
    np.testing.assert_array_equal(moved.astype(jnp.float32), reference.permute(x.astype(jnp.float32), plan))


@pytest.mark.parametrize("dtype", ["int4", "uint4", "int2", "float4_e2m1fn"])
def test_numbers_of_less_than_a_byte_are_moved(dtype):
    """XLA packs them: as whole bytes they would be written past the end of the result."""
    plan = plan_of("clipped")
    x = jnp.asarray(np.random.default_rng(3).integers(0, 2, (11, 13)))
    moved = jax.jit(lambda x: custom_ops.permute(x.astype(dtype), plan))(x)
    assert moved.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(moved.astype(jnp.float32), reference.permute(x, plan))


def test_8_bit_floats_are_summed_and_differentiated():
    """In f32, as 16-bit ones are."""
    plan, *operands = case("clipped", jnp.float8_e5m2)
    actual = everything(custom_ops, *operands, plan)
    expected = everything(reference, *(a.astype(jnp.float32) for a in operands), plan)
    for op, results in actual.items():
        for got, want in zip(results, expected[op], strict=True):
            assert got.dtype == jnp.float8_e5m2
            # Two bits behind the leading one.
            assert_close(got.astype(jnp.float32), want, 2.0**-3, op)


def test_gradients_scatter_no_floats():
    plan, x, _, weights = case("clipped")

    def loss(x, weights):
        return jnp.sum(custom_ops.unpermute(custom_ops.permute(x, plan, weights), plan, weights) ** 2)

    assert "scatter" not in jax.jit(jax.grad(loss, (0, 1))).lower(x, weights).as_text()


PLAN = reference.make_plan(jnp.zeros((4, 2), jnp.int32), 2)
X, ROWS, WEIGHTS = jnp.zeros((4, 3)), jnp.zeros((8, 3)), jnp.zeros((4, 2))


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: custom_ops.permute(X, (1, 2)), ("plan", "make_plan", "(1, 2)")),
        (lambda: custom_ops.unpermute(ROWS, None), ("plan", "make_plan", "None")),
        (
            lambda: custom_ops.unpermute(ROWS, dataclasses.replace(PLAN, num_choices=3)),
            ("plan.num_choices", "2 as in plan.position_TK", "3"),
        ),
        (lambda: custom_ops.permute(X[0], PLAN), ("x_TD", "array [T, D]", "[3]")),
        (lambda: custom_ops.permute(X[:3], PLAN), ("x_TD", "4 tokens", "[3, 3]")),
        (lambda: custom_ops.permute(X, PLAN, WEIGHTS[:, :1]), ("weights_TK", "(4, 2)", "[4, 1]")),
        (lambda: custom_ops.permute(X, PLAN, WEIGHTS.astype(int)), ("weights_TK", "floating", "int32")),
        (lambda: custom_ops.permute(X.astype(int), PLAN, WEIGHTS), ("x_TD", "floating", "int32")),
        (lambda: custom_ops.unpermute(ROWS[:5], PLAN), ("rows_ND", "8 rows", "[5, 3]")),
        (lambda: custom_ops.unpermute(ROWS.astype(int), PLAN), ("rows_ND", "floating", "int32")),
        (lambda: custom_ops.unpermute(ROWS, PLAN, WEIGHTS[0]), ("weights_TK", "array [T, K]", "[2]")),
        (
            lambda: jax.eval_shape(custom_ops.permute, jax.ShapeDtypeStruct((4, 2**30), jnp.int8), PLAN),
            ("x_TD", "2**31", "1073741824"),
        ),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
