import jax
import jax.numpy as jnp
import numpy as np
import pytest

from custom_ops import grouped_matmul, grouped_matmul_mosaic
from custom_ops.grouped_matmul import default_implementation
from tests import tolerance
from tests.custom_ops.test_grouped_matmul import GroupedMatmulConformance, oracle, value_and_gradients
from tests.tolerance import assert_close

pytestmark = pytest.mark.gpu


class TestTriton(GroupedMatmulConformance):
    implementation = "triton"


# Rows per group; what is left of the 1000 rows is the tail.
SIZES = {
    "even": (250, 250, 250, 250),
    "odd, empty and tail": (0, 513, 1, 0, 127, 65),
    "one takes all": (0, 1000, 0),
    "all empty": (0, 0),
}


@pytest.mark.parametrize("implementation", ["mosaic", "triton"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
@pytest.mark.parametrize("name", SIZES)
def test_aligned_widths(implementation, dtype, name):
    N, D, F, sizes = 1000, 384, 256, jnp.asarray(SIZES[name], jnp.int32)
    misfit = grouped_matmul_mosaic.misfit(dtype, D, F, sizes.size)
    if implementation == "mosaic" and misfit:
        pytest.skip(misfit)
    draw = np.random.default_rng(3).standard_normal
    rows, w, dout = (jnp.asarray(draw(s), dtype) for s in ((N, D), (sizes.size, D, F), (N, F)))
    tail = (jnp.arange(N) >= sizes.sum())[:, None]

    def product(rows, w, sizes):
        return grouped_matmul(rows, w, sizes, implementation=implementation)

    run = jax.jit(lambda *a: value_and_gradients(product, *a))
    # A poisoned tail changes nothing.
    actual = run(jnp.where(tail, jnp.nan, rows), w, sizes, jnp.where(tail, jnp.inf, dout))
    expected = oracle(*(a.astype(jnp.float32) for a in (rows, w)), sizes, dout.astype(jnp.float32))
    for part, got, want in zip(("out", "drows", "dw"), actual, expected, strict=True):
        assert_close(np.asarray(got, np.float64), want, tolerance.BF16, part)
    for _ in range(50):
        again = run(rows, w, sizes, dout)
        jax.tree.map(np.testing.assert_array_equal, again, actual)


def test_the_default_is_a_kernel_for_gpus():
    assert default_implementation(jnp.float32, 100, 100, 4).name == "triton"
    assert default_implementation(jnp.bfloat16, 256, 256, 4).name in ("mosaic", "triton")
