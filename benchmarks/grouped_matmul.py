"""Grouped matrix products, forward and both gradients, against what else could be used and against the limit.

    python -m benchmarks.grouped_matmul [--torch PYTHON]

The limit is dense products of the same FLOPs, the gradient written for all E matrices. PYTHON is the interpreter of an
environment with PyTorch; without it that column is empty. So is tokamax's where it is not installed (on CPU it is
`lax.ragged_dot`). All columns are measured in turn in one run; each ratio is
limit / time, so 1 is the limit and more is better.

A second table is on the cost of a token as the experts become more: milliseconds of forward and both gradients, those
of moving the weights' own bytes as often as they must be (read for the product and for the rows' gradient, their
gradient written), and what is left per token against E = 8.
"""

import argparse
import functools
import importlib.util
import pathlib
import statistics
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import environment
from custom_ops.grouped_matmul import default_implementation, grouped_matmul
from train.memory import keep_freed_memory

SHAPES_CPU = [  # N, D, F, E
    (8192, 512, 1024, 8),
    (8192, 512, 1024, 64),
    (8192, 512, 1024, 256),
    (2048, 512, 1024, 64),
    (4096, 128, 160, 8),
]
SHAPES_GPU = [(32768 * 8, 4096, 1024, 128), (8192 * 8, 2048, 1024, 64)]
IMPLEMENTATIONS = {"cpu": ("native", "windows"), "gpu": ("mosaic", "triton", "windows")}
RAGGED_DOT_MAX_EXPERTS = 8  # it costs E times the FLOPs


class TorchPeer:
    """PyTorch's grouped product in a process of its own; `()` gives the milliseconds of one round."""

    def __init__(self, python: str, shape: tuple[int, ...]):
        script = pathlib.Path(__file__).with_name("torch_grouped_mm.py")
        line = [python, str(script), *map(str, shape)]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self.process.stdout.readline().strip()
        if not self.version:
            raise SystemExit(f"--torch {python}: has no working PyTorch")
        self()

    def __call__(self) -> float:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def group_sizes(N: int, E: int, load: str) -> jax.Array:
    """Rows per group: balanced, or drawn from a Dirichlet(1) distribution."""
    if load == "balanced":
        return jnp.full((E,), N // E, jnp.int32)
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.multinomial(N, rng.dirichlet(np.ones(E))), jnp.int32)


def step_of(product):
    """Forward and both gradients of `product(x, w, sizes)`."""

    @jax.jit
    def step(x, w, dy, sizes):
        y, pullback = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
        return y, *pullback(dy)

    return step


@jax.jit
def limit(x, w, dy, sizes):
    dw = jnp.broadcast_to((x.T @ dy)[None], w.shape)
    return x @ w[0], dy @ w[0].T, dw


def tokamax_product():
    """tokamax's grouped product with its own gradients; None where it is not installed."""
    if importlib.util.find_spec("tokamax") is None:
        return None
    import tokamax
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # or it takes our command line for its own
    return tokamax.ragged_dot


def measure(shape: tuple[int, ...], load: str, torch: str | None) -> list[object]:
    N, D, F, E = shape
    platform = jax.default_backend()
    dtype = jnp.float32 if platform == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (N, D), dtype)
    w = jax.random.normal(keys[1], (E, D, F), dtype)
    dy = jax.random.normal(keys[2], (N, F), dtype)
    sizes = group_sizes(N, E, load)
    steps: dict[str, Any] = {"limit": limit}
    for name in IMPLEMENTATIONS[platform]:
        steps[name] = step_of(lambda x, w, s, name=name: grouped_matmul(x, w, s, implementation=name))
    if E <= RAGGED_DOT_MAX_EXPERTS:
        steps["ragged_dot"] = step_of(jax.lax.ragged_dot)
    if platform == "gpu" and (product := tokamax_product()):
        steps["tokamax"] = step_of(product)
    peer = TorchPeer(torch, shape) if torch and load == "balanced" else None
    torch_times = []
    calls = {name: lambda step=step: step(x, w, dy, sizes) for name, step in steps.items()}
    if peer:
        calls["torch"] = lambda: torch_times.append(peer())
    times = environment.milliseconds(calls)
    if peer:
        times["torch"] = statistics.median(torch_times)
        peer.close()
    flops = 3 * 2 * N * D * F
    columns = [*IMPLEMENTATIONS[platform], "torch", "ragged_dot", "tokamax"]
    ratios = [f"{times['limit'] / times[name]:.2f}" if name in times else "" for name in columns]
    return [*shape, load, f"{times['limit']:.1f}", f"{flops / times['limit'] / 1e6:.0f}", *ratios]


def move_weights(w):
    """Reads them twice and writes as much once, as the three products have to."""
    return read(w), read(w), write(w[0, 0, 0], w.shape)


read = jax.jit(jnp.sum)
write = jax.jit(jnp.broadcast_to, static_argnums=1)


def cost_per_token(N: int, D: int, F: int, expert_counts: tuple[int, ...]) -> list[list[object]]:
    """Milliseconds at every E, those of the weights' bytes, and the rest relative to the first E."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    product = step_of(grouped_matmul)
    rows: list[list[object]] = []
    first = 0.0
    for E in expert_counts:
        keys = jax.random.split(jax.random.key(0), 3)
        x, dy = jax.random.normal(keys[0], (N, D), dtype), jax.random.normal(keys[1], (N, F), dtype)
        w = jax.random.normal(keys[2], (E, D, F), dtype)
        sizes = group_sizes(N, E, "balanced")
        calls = {
            "product": functools.partial(product, x, w, dy, sizes),
            "weights": functools.partial(move_weights, w),
        }
        times = environment.milliseconds(calls)
        rest = times["product"] - times["weights"]
        first = first or rest
        rows.append(
            [
                N,
                D,
                F,
                E,
                f"{times['product']:.1f}",
                f"{times['weights']:.1f}",
                f"{rest:.1f}",
                f"{rest / first:.2f}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", help="interpreter of an environment with PyTorch")
    torch = parser.parse_args().torch
    keep_freed_memory()
    platform = jax.default_backend()
    shapes = SHAPES_CPU if platform == "cpu" else SHAPES_GPU
    rows = [measure(shape, load, torch) for shape in shapes for load in ("balanced", "Dirichlet(1)")]
    scaling = cost_per_token(*shapes[0][:3], (8, 64, 256))
    header = ["N", "D", "F", "E", "load", "limit ms", "limit GFLOP/s"]
    header += [*IMPLEMENTATIONS[platform], "PyTorch", "ragged_dot", "tokamax"]
    choice = default_implementation(jnp.float32 if platform == "cpu" else jnp.bfloat16, *shapes[0][1:])
    peer = (
        "PyTorch was not given."
        if torch is None
        else "PyTorch: `torch.nn.functional.grouped_mm`, balanced only."
    )
    columns = ["N", "D", "F", "E", "ms", "the weights' bytes ms", "the rest ms", "the rest against E = 8"]
    text = (
        f"Default here: {choice.name} ({choice.reason}). {peer}\n\n{environment.table(header, rows)}\n\n"
        f"What a token costs as the experts become more:\n\n{environment.table(columns, scaling)}"
    )
    environment.save(f"grouped_matmul_{platform}", "Grouped products: limit / time", text)


if __name__ == "__main__":
    main()
