"""permute, unpermute and plan against XLA's own gathers and against a plain copy of the same bytes.

    python -m benchmarks.permute

Per shape, measured in turn in one run: milliseconds, the bytes that have to move, and two ratios: how much faster than
the path XLA alone would take (`x[token]`, `segment_sum`; an argsort for the plan), and the share of the speed of a copy
that moves as many bytes. A last line per shape is permute and unpermute together.
"""

import jax
import jax.numpy as jnp

from benchmarks import environment
from custom_ops import make_plan, native, permute, unpermute
from train.memory import keep_freed_memory

SHAPES_CPU = [(2048, 2, 128, 8), (8192, 2, 512, 64), (8192, 8, 1536, 128)]  # T, K, D, E
SHAPES_GPU = [(32768, 8, 1536, 128), (32768, 8, 4096, 128)]


# Small shapes are measured more often, so that their medians stand still too.
LEAST_ROUNDS, MOST_ROUNDS, BYTES = 16, 200, 2**31


def xla_plan(dest_TK, E):
    choice_N = jnp.argsort(dest_TK.reshape(-1), stable=True)
    return choice_N, jnp.bincount(dest_TK.reshape(-1), length=E)


def xla_permute(x_TD, choice_N, K):
    return x_TD[choice_N // K]


def xla_unpermute(rows_ND, choice_N, weights_TK, T):
    K = weights_TK.shape[1]
    return jax.ops.segment_sum(rows_ND * weights_TK.reshape(-1)[choice_N][:, None], choice_N // K, T)


def measure(T: int, K: int, D: int, E: int) -> list[list[object]]:
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (T, D), dtype)
    rows = jax.random.normal(keys[1], (T * K, D), dtype)
    weights = jax.random.uniform(keys[2], (T, K), dtype)
    dest = jnp.argsort(jax.random.uniform(keys[3], (T, E)), axis=1)[:, :K].astype(jnp.int32)
    plan = jax.jit(lambda d: make_plan(d, E))(dest)

    def backward(fn):
        return jax.jit(lambda r, w, dy: jax.vjp(fn, r, w)[1](dy))

    ours = {
        "plan": (jax.jit(lambda d: make_plan(d, E)), dest),
        "permute": (jax.jit(lambda x: permute(x, plan)), x),
        "unpermute": (jax.jit(lambda r, w: unpermute(r, plan, w)), rows, weights),
        "backward of unpermute": (backward(lambda r, w: unpermute(r, plan, w)), rows, weights, x),
    }
    choice = plan.choice_N
    theirs = {
        "plan": (jax.jit(lambda d: xla_plan(d, E)), dest),
        "permute": (jax.jit(lambda x: xla_permute(x, choice, K)), x),
        "unpermute": (jax.jit(lambda r, w: xla_unpermute(r, choice, w, T)), rows, weights),
        "backward of unpermute": (
            backward(lambda r, w: xla_unpermute(r, choice, w, T)),
            rows,
            weights,
            x,
        ),
    }
    row = D * dtype(0).itemsize
    # Each token's row read once, each of its rows written; the sums the other way; rows read and written.
    moved = {
        "permute": T * (1 + K) * row,
        "unpermute": T * (1 + K) * row,
        "backward of unpermute": T * (1 + 2 * K) * row,
    }
    result: list[list[object]] = []
    both: dict[str, float] = {"ours": 0, "theirs": 0, "copy": 0}
    for op in ours:
        calls = {
            "ours": lambda op=op: ours[op][0](*ours[op][1:]),
            "theirs": lambda op=op: theirs[op][0](*theirs[op][1:]),
        }
        if op in moved:
            half = jnp.zeros(moved[op] // 2 // 4, jnp.float32)
            copy = jax.jit(lambda a: a + 1)
            calls["copy"] = lambda half=half, copy=copy: copy(half)
        rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, BYTES // (T * (1 + K) * row)))
        times = environment.milliseconds(calls, rounds)
        if op in ("permute", "unpermute"):
            both = {name: both[name] + times[name] for name in both}
        line = [T, K, D, E, op, f"{times['ours']:.3f}", f"{times['theirs'] / times['ours']:.1f}"]
        if op in moved:
            line += [f"{moved[op] / times['ours'] / 1e6:.1f}", f"{times['copy'] / times['ours']:.2f}"]
        else:
            line += ["", ""]
        result.append(line)
    line = [T, K, D, E, "permute + unpermute", f"{both['ours']:.3f}", f"{both['theirs'] / both['ours']:.1f}"]
    line += [f"{2 * moved['permute'] / both['ours'] / 1e6:.1f}", f"{both['copy'] / both['ours']:.2f}"]
    return [*result, line]


def main() -> None:
    keep_freed_memory()
    platform = jax.default_backend()
    shapes = SHAPES_CPU if platform == "cpu" else SHAPES_GPU
    rows = [line for shape in shapes for line in measure(*shape)]
    header = ["T", "K", "D", "E", "op", "ms", "XLA's time / ours", "GB/s", "copy's time / ours"]
    note = f"CPU library: {native.describe()}." if platform == "cpu" else ""
    text = f"{note}\n\n{environment.table(header, rows)}"
    environment.save(f"permute_{platform}", "Moving rows: against XLA and against a copy", text)


if __name__ == "__main__":
    main()
