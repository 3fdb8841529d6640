"""What only the compiled library can get wrong; what it shares with other implementations is tested beside those."""

import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from custom_ops import (
    grouped_matmul,
    grouped_matmul_dlhs,
    grouped_matmul_drhs,
    make_plan,
    native,
    permute,
    unpermute,
)
from custom_ops.target import Target
from tests import tolerance
from tests.tolerance import assert_close


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def grouped_in_f64(rows, w, dout, sizes):
    """(out, drows, dw) by a loop over groups in NumPy."""
    rows, w, dout = (np.asarray(a, np.float64) for a in (rows, w, dout))
    out, drows, dw = np.zeros((len(rows), w.shape[2])), np.zeros_like(rows), np.zeros_like(w)
    first = 0
    for e, size in enumerate(sizes):
        group = slice(first, first + size)
        out[group], drows[group] = rows[group] @ w[e], dout[group] @ w[e].T
        dw[e] = rows[group].T @ dout[group]
        first += size
    return out, drows, dw


# Tiles, panels and blocks begin and end everywhere: rows of 12, 8, 4, 2 and 1, columns of 16 and 32, depth beyond one
# block of 512, more rows and columns than one task takes; and one row, one column.
@pytest.mark.parametrize(
    "D, F, sizes",
    [
        (37, 83, [0, 1, 11, 25, 12, 2]),
        (1100, 300, [600, 0, 7]),
        (1, 1, [3, 1]),
        (16, 513, [23]),
        (7168, 33, [5, 9]),
    ],
    ids=str,
)
def test_blocks_of_every_size(D, F, sizes):
    N, E = sum(sizes) + 3, len(sizes)
    rows, w, dout = draw(0, N, D), draw(1, E, D, F), draw(2, N, F)
    group_sizes = jnp.asarray(sizes, jnp.int32)
    pick = {"implementation": "native"}
    actual = (
        grouped_matmul(rows, w, group_sizes, **pick),
        grouped_matmul_dlhs(dout, w, group_sizes, **pick),
        grouped_matmul_drhs(rows, dout, group_sizes, **pick),
    )
    for got, want, name in zip(
        actual, grouped_in_f64(rows, w, dout, sizes), ("out", "drows", "dw"), strict=True
    ):
        assert_close(np.asarray(got, np.float64), want, tolerance.F32, name)


def test_a_row_does_not_depend_on_its_neighbours():
    rows, w = draw(0, 100, 70), draw(1, 2, 70, 90)
    one_group = grouped_matmul(rows, w, jnp.asarray([100, 0], jnp.int32), implementation="native")
    alone = grouped_matmul(rows[57:58], w, jnp.asarray([1, 0], jnp.int32), implementation="native")
    np.testing.assert_array_equal(one_group[57], alone[0])


@pytest.mark.parametrize("D", [1, 7, 64, 100, 1536, 7168])
def test_widths_and_repeats_bitwise(D):
    T, K, P = 33, 4, 5
    plan = make_plan(jnp.asarray(np.random.default_rng(3).integers(-1, P, (T, K)), jnp.int32), P, 20)
    x, weights = draw(4, T, D), draw(5, T, K)

    @jax.jit
    def run(x, weights):
        def there_and_back(x, weights):
            return unpermute(permute(x, plan), plan, weights)

        y, pullback = jax.vjp(there_and_back, x, weights)
        return y, *pullback(x)

    first = run(x, weights)
    served = np.asarray(plan.position_TK) >= 0
    scale = np.where(served, np.asarray(weights, np.float64), 0).sum(axis=1, keepdims=True)
    x64 = np.asarray(x, np.float64)
    assert_close(np.asarray(first[0], np.float64), x64 * scale, tolerance.F32, "y")
    assert_close(np.asarray(first[1], np.float64), x64 * scale, tolerance.F32, "dx")
    assert_close(
        np.asarray(first[2], np.float64),
        np.where(served, (x64**2).sum(axis=1, keepdims=True), 0),
        tolerance.F32,
        "dweights",
    )
    for _ in range(49):
        jax.tree.map(np.testing.assert_array_equal, run(x, weights), first)


@pytest.mark.repo
def test_handlers_for_cuda_take_what_those_for_cpu_take():
    """Programs for GPUs are only compiled here, which checks no operand: calling the CPU's must stand for both."""
    csrc = pathlib.Path(__file__).parents[2] / "custom_ops" / "csrc"

    def bindings(suffix):
        found = {}
        for path in csrc.glob(f"*{suffix}"):
            for symbol in path.read_text().split("XLA_FFI_DEFINE_HANDLER_SYMBOL(")[1:]:
                name = symbol.partition(",")[0]
                found[name] = re.findall(r"\.(Arg|Ret|Attr)<(.*?)>\((.*?)\)", symbol)
        return found

    cpu, cuda = bindings(".cc"), bindings(".cu")
    assert set(cuda) == set(native._CUDA[1]) and set(cpu) == set(native._CPU[1])
    assert all(len(cuda[name]) > 3 and cuda[name] == cpu[name] for name in cuda), (cuda, cpu)


def shaped(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    "name, results, operands, attributes, words",
    [
        ("grouped_matmul", shaped((3, 5)), (jnp.ones((3, 4)), jnp.ones((2, 6, 5)), jnp.ones(2, jnp.int32)),
         {"transposed": False}, "the width of lhs"),
        ("grouped_matmul", shaped((3, 5)), (jnp.ones((3, 4)), jnp.ones((2, 4, 5)), jnp.ones(3, jnp.int32)),
         {"transposed": False}, "group sizes"),
        ("grouped_matmul_drhs", shaped((2, 4, 5)), (jnp.ones((3, 4)), jnp.ones((2, 5)), jnp.ones(2, jnp.int32)),
         {}, "as many rows"),
        ("grouped_matmul", shaped((3, 5), jnp.bfloat16),
         (jnp.ones((3, 4)), jnp.ones((2, 4, 5)), jnp.ones(2, jnp.int32)), {"transposed": False},
         "must have the operands' dtype"),
        ("unpermute", shaped((3, 4)), (jnp.ones((3, 4)), jnp.zeros((2, 1), jnp.int32), jnp.zeros((0, 0))), {},
         "a position for every token"),
        ("make_plan", [shaped((2, 1), jnp.int32), shaped((5,), jnp.int32), shaped((2,), jnp.int32),
                       shaped((2, 1), jnp.bool_), shaped((), jnp.int32), shaped((0,), jnp.int32)],
         (jnp.zeros((2, 1), jnp.int32),), {"bucket_rows": np.int64(3), "unique": False}, "choices must be"),
        ("swiglu", shaped((3, 2)), (jnp.ones((3, 5)),), {}, "hidden must be"),
        ("unpermute", shaped((2, 4)), (jnp.ones((3, 4)), jnp.full((2, 1), 3, jnp.int32), jnp.zeros((0, 0))), {},
         "rows that do not exist"),
        ("permute", shaped((3, 4), jnp.int4), (jnp.ones((2, 4), jnp.int4), jnp.zeros((2, 1), jnp.int32),
         jnp.zeros(3, jnp.int32), jnp.zeros((0, 0))), {}, "at least 8 bits"),
        ("permute", shaped((3, 4)), (jnp.ones((2, 4)), jnp.full((2, 1), 3, jnp.int32), jnp.zeros(3, jnp.int32),
         jnp.zeros((0, 0))), {}, "rows that do not exist"),
    ],
)  # fmt: skip
def test_a_wrong_call_is_an_error_not_a_crash(name, results, operands, attributes, words):
    with pytest.raises(jax.errors.JaxRuntimeError, match=words):
        native.call(f"moejax_{name}", results, *operands, **attributes)


def test_a_handler_that_runs_out_of_memory_is_an_error_not_a_crash():
    """Its counters take twice the memory of its results, which alone fit: the allocation throws in C++."""
    program = """
import resource
import jax.numpy as jnp
from custom_ops import make_plan

dest = jnp.zeros((2, 1), jnp.int32)
make_plan(dest, 3)
taken = 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize")))
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**30, taken + 2**30))
print(make_plan(dest, 2**27).num_invalid)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "INTERNAL: moejax: std::bad_alloc" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere only one is compiled")
@pytest.mark.parametrize("instruction_set", ["SSE2", "AVX2"])
def test_what_older_processors_run(instruction_set):
    """The library holds the loops once per instruction set, and otherwise only the machine's best is tested."""
    environment = {**os.environ, "MOEJAX_INSTRUCTION_SET": instruction_set}
    program = "from custom_ops import native; print(native.describe())"
    described = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    if described.stdout.strip() != f"built, uses {instruction_set}":
        pytest.skip(f"this machine: {described.stdout.strip()}")
    files = [
        pathlib.Path(__file__).with_name(f"test_{name}.py") for name in ("native", "drawn_cases", "swiglu")
    ]
    command = [sys.executable, "-m", "pytest", "-q", *files, "-k", "not out_of_memory and not xla"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]


def test_without_the_library_there_is_a_warning_and_the_same_result(monkeypatch):
    x, dest = draw(0, 6, 4), jnp.asarray([[0, 1], [1, 1], [2, 0], [0, 0], [-1, 2], [1, 0]], jnp.int32)
    with_library = permute(x, make_plan(dest, 3))
    native._load.cache_clear()
    native._warn_once.cache_clear()
    monkeypatch.setattr("custom_ops.__path__", [])
    try:
        with pytest.warns(UserWarning, match="without its native CPU ops"):
            plan = make_plan(dest, 3)
        np.testing.assert_array_equal(permute(x, plan), with_library)
        assert native.describe().startswith("not built")
    finally:
        native._load.cache_clear()


@pytest.mark.parametrize("kind", ["no library", "older than the sources"])
def test_a_library_that_does_not_load_is_a_warning_that_says_why(monkeypatch, tmp_path, kind):
    library = tmp_path / "libmoejax_cpu.so"
    if kind == "no library":
        library.write_bytes(b"damaged")
    else:
        compiler = shutil.which("cc") or pytest.skip("no compiler")
        subprocess.run([compiler, "-shared", "-x", "c", "-", "-o", library], input=b"", check=True)
    native._load.cache_clear()
    native._warn_once.cache_clear()
    monkeypatch.setattr("custom_ops.__path__", [str(tmp_path)])
    try:
        with pytest.warns(
            UserWarning, match=r"without its native CPU ops \(libmoejax_cpu.so does not load: "
        ):
            plan = make_plan(jnp.asarray([[1], [0]], jnp.int32), 2)
        np.testing.assert_array_equal(plan.position_TK, [[1], [0]])
        assert native.describe().startswith("libmoejax_cpu.so does not load: ")
    finally:
        native._load.cache_clear()
        native._warn_once.cache_clear()


def gpu_is_target(monkeypatch):
    monkeypatch.setattr("custom_ops.native.target", lambda: Target("gpu", "NVIDIA H200"))


def gpu_is_beside(monkeypatch):
    """Programs are traced for the CPU, but could be compiled for a GPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("see_gpu", [gpu_is_target, gpu_is_beside])
def test_on_a_gpu_a_missing_library_is_never_silent(monkeypatch, see_gpu):
    native._load.cache_clear()
    native._warn_once.cache_clear()
    monkeypatch.setattr("custom_ops.__path__", [])
    try:
        assert native.cuda_library() is None  # no GPU, no warning
        see_gpu(monkeypatch)
        with pytest.warns(UserWarning, match=r"without its native CUDA ops \(no nvcc was found\)"):
            assert native.cuda_library() is None
    finally:
        native._load.cache_clear()
        native._warn_once.cache_clear()
