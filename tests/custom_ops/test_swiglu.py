import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import custom_ops
from custom_ops import native, reference, swiglu, swiglu_backward
from tests import tolerance
from tests.tolerance import assert_close


@pytest.fixture(params=["native", "xla"], autouse=True)
def path(request):
    assert native.cpu_library() is not None
    with native.disabled() if request.param == "xla" else contextlib.nullcontext():
        yield request.param


@pytest.mark.parametrize("F", [1, 15, 16, 83])
@pytest.mark.parametrize(
    "dtype, bound", [("float32", tolerance.F32), ("float64", tolerance.F64), ("bfloat16", tolerance.BF16)]
)
def test_matches_the_specification(F, dtype, bound):
    draw = np.random.default_rng(F).standard_normal
    with jax.enable_x64(True):
        hidden = jnp.asarray(4 * draw((9, 2 * F)), dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        da, weight = jnp.asarray(draw((9, F)), wide), jnp.asarray(draw(9), wide)
        actual = (swiglu(hidden), *swiglu_backward(hidden, da, weight))
        exact = [a.astype(jnp.float64) for a in (hidden, da, weight)]
        expected = (reference.swiglu(exact[0]), *reference.swiglu_backward(*exact))
        for got, want, like in zip(actual, expected, (hidden, hidden, hidden, da), strict=True):
            assert got.dtype == like.dtype
            assert_close(np.asarray(got, np.float64), np.asarray(want), bound, "swiglu")


def test_both_passes_are_differentiated():
    """An expert's gradient calls swiglu_backward; who takes a second one differentiates that."""
    draw = np.random.default_rng(1).standard_normal
    operands = [jnp.asarray(draw(shape), jnp.float32) for shape in ((9, 30), (9, 15), (9,))]

    def gradients(ops):
        first = jax.grad(lambda hidden: jnp.sum(jnp.sin(ops.swiglu(hidden))))(operands[0])
        second = jax.grad(
            lambda *o: sum(jnp.sum(jnp.sin(part)) for part in ops.swiglu_backward(*o)), (0, 1, 2)
        )(*operands)
        return first, *second

    for got, want in zip(gradients(custom_ops), gradients(reference), strict=True):
        assert_close(got, want, tolerance.F32_MODEL)


def test_extreme_gates():
    gates = jnp.asarray([-1e30, -200.0, -88.0, -0.0, 0.0, 88.0, 200.0, 1e30, jnp.nan], jnp.float32)
    a = np.asarray(swiglu(jnp.concatenate([gates[:, None], jnp.ones((9, 1))], axis=1)))[:, 0]
    np.testing.assert_allclose(a[:8], [0, 0, 0, 0, 0, 88, 200, 1e30], rtol=1e-6, atol=1e-35)
    assert np.isnan(a[8])


@pytest.mark.parametrize(
    "hidden, da, weight, word",
    [
        ((3, 5), (3, 2), (3,), "even"),
        ((3, 4), (3, 3), (3,), "da_NF"),
        ((3, 4), (3, 2), (2,), "weight_N"),
        ((4,), (3, 2), (3,), r"array \[N, 2F\]"),
    ],
)
def test_refuses(hidden, da, weight, word):
    with pytest.raises(ValueError, match=word):
        swiglu_backward(jnp.ones(hidden), jnp.ones(da), jnp.ones(weight))
