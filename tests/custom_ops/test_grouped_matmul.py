import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from custom_ops import grouped_matmul, grouped_matmul_dlhs, grouped_matmul_drhs, reference
from custom_ops.grouped_matmul import IMPLEMENTATIONS, default_implementation
from tests import tolerance
from tests.tolerance import assert_close

# name: (N, D, F, group sizes); N beyond the sum of the sizes is the tail.
CASES = {
    "even": (64, 8, 12, (16, 16, 16, 16)),
    "odd sizes and tail": (110, 7, 5, (0, 67, 1, 0, 30, 7, 0)),
    "one takes all": (100, 5, 3, (0, 100, 0)),
    "all empty": (40, 5, 3, (0, 0, 0)),
    "one row": (1, 3, 2, (0, 1)),
    "no row": (0, 3, 2, (0, 0)),
    "one group": (33, 4, 4, (20,)),
    "many windows, small groups at the end": (1300, 3, 4, (1260, 20, 15, 5)),
}
DTYPES = {
    jnp.float32.dtype: tolerance.F32,
    jnp.float64.dtype: tolerance.F64,
    jnp.bfloat16.dtype: tolerance.BF16,
    jnp.float16.dtype: tolerance.F16,
}


def operands(name, dtype=jnp.float32):
    N, D, F, sizes = CASES[name]
    draw = np.random.default_rng(5).standard_normal
    arrays = [jnp.asarray(draw(s), dtype) for s in ((N, D), (len(sizes), D, F), (N, F))]
    return *arrays, jnp.asarray(sizes, jnp.int32)


def value_and_gradients(product, rows, w, sizes, dout):
    out, pullback = jax.vjp(lambda rows, w: product(rows, w, sizes), rows, w)
    return out, *pullback(dout)


def all_three(implementation, rows, w, dout, sizes):
    return (
        grouped_matmul(rows, w, sizes, implementation=implementation),
        grouped_matmul_dlhs(dout, w, sizes, implementation=implementation),
        grouped_matmul_drhs(rows, dout, sizes, implementation=implementation),
    )


@functools.lru_cache
def compiled(function, *static):
    return jax.jit(functools.partial(function, *static))


# Plain differentiation of the specification.
oracle = jax.jit(functools.partial(value_and_gradients, reference.grouped_matmul))


class GroupedMatmulConformance:
    """What every implementation has to do."""

    implementation: str

    def product(self, rows, w, sizes, dtype=None):
        return grouped_matmul(rows, w, sizes, implementation=self.implementation, dtype=dtype)

    def all_three(self, rows, w, dout, sizes):
        return compiled(all_three, self.implementation)(rows, w, dout, sizes)

    @pytest.mark.parametrize(
        "name, dtype",
        [(name, jnp.float32.dtype) for name in CASES]
        + [("odd sizes and tail", dtype) for dtype in DTYPES if dtype != jnp.float32],
        ids=str,
    )
    def test_values_and_gradients(self, name, dtype):
        with jax.enable_x64(dtype == jnp.float64):
            rows, w, dout, sizes = operands(name, dtype)
            actual = jax.jit(lambda *a: value_and_gradients(self.product, *a))(rows, w, sizes, dout)
        # The oracle gets the same numbers in f64, so the tolerance is the product's own rounding.
        with jax.enable_x64(True):
            expected = oracle(*(a.astype(jnp.float64) for a in (rows, w)), sizes, dout.astype(jnp.float64))
        for part, got, want in zip(("out", "drows", "dw"), actual, expected, strict=True):
            assert got.dtype == dtype
            assert_close(np.asarray(got, np.float64), want, DTYPES[dtype], part)

    @pytest.mark.parametrize("name", ["odd sizes and tail", "one group", "all empty"])
    def test_poisoned_tail_stays_out(self, name):
        rows, w, dout, sizes = operands(name)
        tail = (jnp.arange(rows.shape[0]) >= sizes.sum())[:, None]
        clean = self.all_three(rows, w, dout, sizes)
        dirty = self.all_three(jnp.where(tail, jnp.nan, rows), w, jnp.where(tail, jnp.inf, dout), sizes)
        for got, want in zip(dirty, clean, strict=True):
            np.testing.assert_array_equal(got, want)
        for product in dirty[:2]:
            assert (product[int(sizes.sum()) :] == 0).all()

    @pytest.mark.parametrize(
        "sizes, meant", [([40, 40, 40, 3], [40, 24, 0, 0]), ([-3, 40, -1, 10], [0, 40, 0, 10])]
    )
    def test_sizes_beyond_the_rows_are_cut_off_and_negative_ones_are_0(self, sizes, meant):
        rows, w, dout, _ = operands("even")
        got, want = (self.all_three(rows, w, dout, jnp.asarray(s, jnp.int32)) for s in (sizes, meant))
        jax.tree.map(np.testing.assert_array_equal, got, want)

    def test_a_bad_row_stays_in_its_group(self):
        rows, w, dout, sizes = operands("odd sizes and tail")
        rows = rows.at[67].set(jnp.nan)  # the only row of group 2
        out, _, dw = self.all_three(rows, w, dout, sizes)
        np.testing.assert_array_equal(jnp.flatnonzero(jnp.isnan(out).any(axis=1)), [67])
        np.testing.assert_array_equal(jnp.flatnonzero(jnp.isnan(dw).any(axis=(1, 2))), [2])

    def test_accumulates_and_returns_wide_on_request(self):
        rows, w, dout, sizes = operands("odd sizes and tail", jnp.bfloat16)
        got = jax.jit(lambda *a: self.product(*a, dtype=jnp.float32))(rows, w, sizes)
        wide = [a.astype(jnp.float32) for a in (rows, w)]
        assert got.dtype == jnp.float32
        assert_close(got, reference.grouped_matmul(*wide, sizes), tolerance.F32)
        dw = jax.jit(
            lambda r, d, s: grouped_matmul_drhs(
                r, d, s, implementation=self.implementation, dtype=jnp.float32
            )
        )(rows, dout, sizes)
        assert_close(
            dw,
            reference.grouped_matmul_drhs(rows.astype(jnp.float32), dout.astype(jnp.float32), sizes),
            tolerance.F32,
        )

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
    def test_gradients_of_a_wide_result(self, dtype):
        """The cotangent is then f32 beside operands of 16 bits."""
        rows, w, dout, sizes = (a.astype(dtype) if a.ndim > 1 else a for a in operands("one group"))

        def product(rows, w, sizes):
            return self.product(rows, w, sizes, dtype=jnp.float32)

        dout = dout.astype(jnp.float32) / 3
        actual = jax.jit(lambda *a: value_and_gradients(product, *a))(rows, w, sizes, dout)
        expected = oracle(rows.astype(jnp.float32), w.astype(jnp.float32), sizes, dout)
        assert [a.dtype for a in actual] == [jnp.float32, dtype, dtype]
        for got, want, bound in zip(
            actual, expected, (tolerance.F32, *[DTYPES[jnp.dtype(dtype)]] * 2), strict=True
        ):
            assert_close(np.asarray(got, np.float64), want, bound)

    def test_no_group(self):
        rows, w, dout = jnp.ones((4, 3)), jnp.ones((0, 3, 2)), jnp.ones((4, 2))
        out, drows, dw = self.all_three(rows, w, dout, jnp.zeros((0,), jnp.int32))
        assert out.shape == (4, 2) and drows.shape == (4, 3) and dw.shape == (0, 3, 2)
        assert (out == 0).all() and (drows == 0).all()

    def test_repeats_bitwise(self):
        rows, w, dout, sizes = operands("odd sizes and tail")
        first = self.all_three(rows, w, dout, sizes)
        for _ in range(49):
            jax.tree.map(np.testing.assert_array_equal, self.all_three(rows, w, dout, sizes), first)

    def test_second_derivatives(self):
        rows, w, _, sizes = operands("one group")

        def slope(product):
            def squared(rows, w):
                grads = jax.grad(lambda r, w: jnp.sum(jnp.sin(product(r, w, sizes))), (0, 1))(rows, w)
                return sum(jnp.sum(g**2) for g in grads)

            return jax.jit(jax.grad(squared, (0, 1)))(rows, w)

        for got, want in zip(slope(self.product), slope(reference.grouped_matmul), strict=True):
            assert_close(got, want, tolerance.F32_MODEL)

    def test_under_remat_and_scan(self):
        rows, w, _, sizes = operands("even")
        w = w[:, :, :8] / 3

        def loss(product, wrap):
            def layer(x, _):
                return jnp.sin(product(x, w, sizes)), None

            return lambda x: jnp.sum(jax.lax.scan(wrap(layer), x, None, length=3)[0])

        got = jax.jit(jax.grad(loss(self.product, jax.checkpoint)))(rows)
        want = jax.jit(jax.grad(loss(reference.grouped_matmul, lambda f: f)))(rows)
        assert_close(got, want, tolerance.F32_MODEL)

    def test_under_vmap(self):
        rows, w, dout, sizes = operands("even")
        many_sizes = jnp.stack([sizes, jnp.asarray([0, 60, 0, 1]), jnp.asarray([5, 4, 3, 2])])
        many_rows = jnp.stack([rows, rows[::-1], 2 * rows])

        def run(rows, sizes):
            return value_and_gradients(self.product, rows, w, sizes, dout)

        batched = jax.jit(jax.vmap(run))(many_rows, many_sizes)
        for i in range(3):
            expected = oracle(many_rows[i], w, many_sizes[i], dout)
            for got, want in zip(batched, expected, strict=True):
                assert_close(got[i], want, tolerance.F32)

    # Without varying-axes checks nothing tells that w is shared: there the caller has to sum.
    @pytest.mark.parametrize("check_vma, shared_w", [(True, False), (True, True), (False, False)])
    def test_inside_shard_map(self, check_vma, shared_w):
        """Four devices with different group sizes; a w that all of them share gets the sum of gradients."""
        if jax.device_count() < 4:
            pytest.skip("needs four devices")
        mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
        draw = np.random.default_rng(6)
        rows = jnp.asarray(draw.standard_normal((4 * 50, 6)), jnp.float32)
        w = jnp.asarray(draw.standard_normal((3 if shared_w else 12, 6, 5)), jnp.float32)
        sizes = jnp.asarray([10, 20, 5, 0, 0, 0, 50, 0, 0, 1, 0, 49], jnp.int32)

        def body(rows, w, sizes):
            return jax.grad(lambda r, w: jnp.sum(jnp.sin(self.product(r, w, sizes))), (0, 1))(rows, w)

        spec = jax.P("expert")
        w_spec = jax.P() if shared_w else spec
        sharded = jax.shard_map(
            body, mesh=mesh, in_specs=(spec, w_spec, spec), out_specs=(spec, w_spec), check_vma=check_vma
        )
        if check_vma and self.implementation == "triton" and jax.default_backend() == "cpu":
            # Pallas's interpreter slices what varies at what does not; tests/compile_gpu has the kernel itself.
            with pytest.raises(ValueError, match="dynamic_slice requires varying manual axes to match"):
                jax.jit(sharded)(rows, w, sizes)
            return
        drows, dw = jax.jit(sharded)(rows, w, sizes)

        @jax.jit
        @functools.partial(jax.grad, argnums=(0, 1))
        def expect(rows, w, sizes):
            return jnp.sum(jnp.sin(reference.grouped_matmul(rows, w, sizes)))

        expected_dw = []
        for i in range(4):
            groups = slice(3 * i, 3 * i + 3)
            expected = expect(rows[50 * i : 50 * i + 50], w if shared_w else w[groups], sizes[groups])
            assert_close(drows[50 * i : 50 * i + 50], expected[0], tolerance.F32)
            expected_dw.append(expected[1])
        assert_close(dw, sum(expected_dw) if shared_w else jnp.concatenate(expected_dw), tolerance.F32)


class TestWindows(GroupedMatmulConformance):
    implementation = "windows"

    def test_one_loop_over_groups_whatever_their_number(self):
        def instructions(E):
            args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 4), (E, 4, 4))]
            sizes = jax.ShapeDtypeStruct((E,), jnp.int32)
            return jax.jit(self.product).lower(*args, sizes).as_text().count("\n")

        assert instructions(64) == instructions(4)


class TestTriton(GroupedMatmulConformance):
    """In Pallas's interpreter; tests/gpu runs the compiled kernels."""

    implementation = "triton"

    @pytest.mark.slow
    def test_several_tiles_in_every_direction(self):
        N, D, F, sizes = 300, 150, 140, jnp.asarray([130, 0, 41, 99], jnp.int32)
        draw = np.random.default_rng(7).standard_normal
        rows, w, dout = (jnp.asarray(draw(s), jnp.float32) for s in ((N, D), (4, D, F), (N, F)))
        expected = compiled(all_three, "reference")(rows, w, dout, sizes)
        for got, want in zip(self.all_three(rows, w, dout, sizes), expected, strict=True):
            assert_close(got, want, tolerance.F32)


class TestReference(GroupedMatmulConformance):
    implementation = "reference"


class TestNative(GroupedMatmulConformance):
    implementation = "native"

    def test_16_bit_operands_are_never_copied_to_f32(self):
        rows, w, dout, sizes = operands("odd sizes and tail", jnp.bfloat16)
        text = compiled(all_three, self.implementation).lower(rows, w, dout, sizes).as_text()
        assert "f32" not in text and "stablehlo.convert" not in text


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 48), min_size=4, max_size=4), st.booleans())
def test_drawn_sizes(sizes, poison):
    """Every implementation against the reference, all in one shape so that they compile once."""
    N, D, F = 192, 3, 4
    draw = np.random.default_rng(8).standard_normal
    rows, dout = jnp.asarray(draw((N, D)), jnp.float32), jnp.asarray(draw((N, F)), jnp.float32)
    w, sizes = jnp.asarray(draw((4, D, F)), jnp.float32), jnp.asarray(sizes, jnp.int32)
    expected = compiled(all_three, "reference")(rows, w, dout, sizes)
    tail = np.arange(N)[:, None] >= np.sum(sizes)
    bad = np.where(tail & poison, np.float32(np.nan), np.float32(0))
    for name in sorted(set(IMPLEMENTATIONS) - {"reference", "mosaic"}):
        for got, want in zip(
            compiled(all_three, name)(rows + bad, w, dout + bad, sizes), expected, strict=True
        ):
            assert_close(got, want, tolerance.F32, name)


def test_agrees_with_ragged_dot():
    rows, w, _, sizes = operands("odd sizes and tail")
    assert_close(jax.jit(grouped_matmul)(rows, w, sizes), jax.lax.ragged_dot(rows, w, sizes), tolerance.F32)


def test_default_is_a_known_implementation():
    rows, w, _, sizes = operands("even")
    name, reason = default_implementation(rows.dtype, *w.shape[1:], w.shape[0])
    assert "cpu" in reason
    named = grouped_matmul(rows, w, sizes, implementation=name)
    np.testing.assert_array_equal(grouped_matmul(rows, w, sizes), named)


@pytest.mark.parametrize(
    "kind, dtype, D, result_dtype, name, word",
    [
        ("NVIDIA H200", jnp.bfloat16, 256, None, "mosaic", "H200"),
        ("NVIDIA H100 80GB HBM3", jnp.float16, 256, jnp.float16, "mosaic", "H100"),
        ("NVIDIA GH200 480GB", jnp.bfloat16, 256, None, "mosaic", "GH200"),
        ("NVIDIA H200", jnp.bfloat16, 100, None, "triton", "multiples of 128"),
        ("NVIDIA H200", jnp.float32, 256, None, "triton", "float32 is not a 16-bit"),
        ("NVIDIA H200", jnp.bfloat16, 256, jnp.float32, "triton", "result is float32"),
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, 256, None, "triton", "no Hopper"),
        ("NVIDIA B200", jnp.bfloat16, 256, None, "triton", "no Hopper"),
    ],
)
def test_default_follows_the_device_that_is_traced_for(kind, dtype, D, result_dtype, name, word):
    """The device stands in the ambient mesh; none is there."""
    gpu = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("expert",), abstract_device=gpu)
    with jax.sharding.use_abstract_mesh(mesh):
        choice = default_implementation(dtype, D, 128, 8, result_dtype)
    assert choice.name == name and word in choice.reason


ROWS, W, DOUT, SIZES = jnp.zeros((6, 3)), jnp.zeros((2, 3, 4)), jnp.zeros((6, 4)), jnp.zeros((2,), jnp.int32)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: grouped_matmul(ROWS[0], W, SIZES), ("rows_ND", "array [N, D]", "[3]")),
        (lambda: grouped_matmul(ROWS, W[0], SIZES), ("w_EDF", "array [E, D, F]", "[3, 4]")),
        (lambda: grouped_matmul(ROWS, W[:, :2], SIZES), ("rows_ND", "width 2", "[6, 3]")),
        (lambda: grouped_matmul(ROWS, W, SIZES[:1]), ("group_sizes_E", "2 groups", "[1]")),
        (lambda: grouped_matmul(ROWS, W, SIZES.astype(jnp.float32)), ("group_sizes_E", "integer", "float32")),
        (lambda: grouped_matmul(ROWS.astype(int), W, SIZES), ("rows_ND", "floating", "int32")),
        (lambda: grouped_matmul(ROWS, W.astype(jnp.bfloat16), SIZES), ("w_EDF", "float32", "bfloat16")),
        (lambda: grouped_matmul(ROWS, W, SIZES, implementation="window"), ("implementation", "windows")),
        (lambda: grouped_matmul(ROWS, W, SIZES, implementation="mosaic"), ("implementation", "Hopper")),
        (lambda: grouped_matmul_dlhs(ROWS, W, SIZES), ("dout_NF", "width 4", "[6, 3]")),
        (lambda: grouped_matmul_dlhs(DOUT, W, SIZES[:1]), ("group_sizes_E", "2 groups")),
        (lambda: grouped_matmul_drhs(ROWS, DOUT[:5], SIZES), ("dout_NF", "6 rows", "[5, 4]")),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError) as error:
        call()
    assert all(word in str(error.value) for word in words), error.value
