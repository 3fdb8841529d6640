"""What every test on a GPU needs."""

import jax
import pytest


@pytest.fixture(autouse=True)
def true_f32():
    """XLA's own products, the reference's, would round f32 to TF32 otherwise."""
    if jax.default_backend() != "gpu":
        pytest.fail("no GPU: run with JAX_PLATFORMS=cuda on a machine that has one")
    with jax.default_matmul_precision("float32"):
        yield
