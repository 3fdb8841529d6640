"""plan, permute, unpermute and its fused backward: the CUDA kernels against the specification."""

import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import custom_ops
from custom_ops import make_plan, native, permute, reference
from tests.custom_ops.test_permute import PermuteConformance
from tests.custom_ops.test_plan import PlanConformance
from tests.gpu import every_kernel
from tests.tolerance import F32, assert_close

pytestmark = pytest.mark.gpu


def test_the_library_is_there():
    assert native.cuda_library() is not None


class TestPermute(PermuteConformance):
    ops = custom_ops


class TestPlan(PlanConformance):
    pass


@pytest.mark.parametrize("D", [1, 7, 64, 100, 1536, 7168])
@pytest.mark.parametrize("K", [1, 8, 9, 16])
def test_widths_and_choices(D, K):
    """More choices than are read together, and rows that no wide access divides."""
    draw = np.random.default_rng(D)
    plan = make_plan(jnp.asarray(draw.integers(-1, 5, (37, K)), jnp.int32), 5, 40)
    x = jnp.asarray(draw.standard_normal((37, D)), jnp.bfloat16)
    weights = jnp.asarray(draw.standard_normal((37, K)), jnp.float32)
    rows = permute(x, plan)
    np.testing.assert_array_equal(rows, reference.permute(x, plan))

    def value_and_gradients(ops, rows, weights):
        value, pullback = jax.vjp(lambda rows, weights: ops.unpermute(rows, plan, weights), rows, weights)
        return value, *pullback(x.astype(jnp.float32))

    rows = rows.astype(jnp.float32)
    actual = value_and_gradients(custom_ops, rows, weights)
    expected = value_and_gradients(reference, rows, weights)
    for part, got, want in zip(("value", "drows", "dweights"), actual, expected, strict=True):
        assert_close(got, want, F32, part)


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn, np.float16, np.float64], ids=str)
def test_payloads_arrive_bit_by_bit(dtype):
    with jax.enable_x64(dtype == np.float64):
        plan = make_plan(jnp.asarray([[0, 2], [2, -1], [1, 0]], jnp.int32), 3)
        x = jnp.asarray(np.arange(3 * 13).reshape(3, 13), dtype)
        got, want = np.asarray(permute(x, plan)), np.asarray(reference.permute(x, plan))
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [
        sanitizer,
        "--tool",
        tool,
        "--error-exitcode",
        "1",
        sys.executable,
        "-m",
        every_kernel.__name__,
    ]
    root = pathlib.Path(__file__).parents[2]
    # In the one allocation of jax's own pool the sanitizer could not tell a buffer from its neighbour.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stdout + result.stderr
