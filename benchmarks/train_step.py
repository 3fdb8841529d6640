"""What a train step costs: products, everything else, the optimizer, and MoE against its dense twin.

    python -m benchmarks.train_step

Four tables, all measured in one run, programs taken in turn so that a machine that changes its speed changes it for
all of them: the share of the quickstart's step that is spent in matrix products (from the profiler's trace of the
compiled program), the MoE's step against that of the dense model of the same active parameters at several batch
sizes with AdamW, the share of the optimizer for AdamW and Muon, and the quickstart's step with the native ops and with
plain XLA in their place.
"""

import dataclasses
import glob
import gzip
import json
import re
import tempfile
import time

import jax
import jax.numpy as jnp

from benchmarks import environment
from benchmarks.environment import milliseconds
from benchmarks.twins import VOCAB, Compiled, active_parameters, dense_twin
from configs import quickstart
from custom_ops import native
from train.config import TrainConfig
from train.memory import keep_freed_memory
from train.model import ModelSpec


def time_by_kind(compiled: Compiled) -> dict[str, float]:
    """Where the wall time of a step goes, in milliseconds, from a profiler trace; the parts add up to `wall`.

    `products`: while at least one operation with a matrix product runs; `other`: while only others run;
    `unattributed`: while none does that the trace knows.
    """
    text = compiled.program.as_text()
    bodies: dict[str, str] = {}
    for name, body in re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.M | re.S):
        bodies[name] = body
    operations = dict(re.findall(r"^\s*(?:ROOT )?%?([\w.\-]+) = ([^\n]*)", text, re.M))

    def kind(name: str) -> str | None:
        line = operations.get(name)
        if line is None or re.search(r" (while|call|conditional)\(", line):
            return None  # not an operation of the program, or one whose parts are counted themselves
        called = re.search(r"calls=%?([\w.\-]+)", line)
        inside = bodies.get(called[1], "") if called else ""
        return "products" if re.search(r' dot\(|custom_call_target="[^"]*matmul', line + inside) else "other"

    steps = 5
    jax.block_until_ready(compiled.step())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            began = time.perf_counter()
            for _ in range(steps):
                jax.block_until_ready(compiled.step())
            wall = 1e3 * (time.perf_counter() - began)
        with gzip.open(glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)[0]) as file:
            events = json.load(file)["traceEvents"]
    spans: dict[str, list[tuple[float, float]]] = {"products": [], "other": []}
    for event in events:
        if event.get("ph") == "X" and (found := kind(event["name"])):
            spans[found].append((event["ts"], event["ts"] + event["dur"]))
    products = covered(spans["products"]) / 1e3
    busy = covered(spans["products"] + spans["other"]) / 1e3
    parts = {"wall": wall, "products": products, "other": busy - products, "unattributed": wall - busy}
    return {name: value / steps for name, value in parts.items()}


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals: several threads at once count once."""
    total = reached = 0.0
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0)
        reached = max(reached, end)
    return total


def with_batch(config: TrainConfig, batch_size: int, optimizer: str) -> TrainConfig:
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=batch_size),
        optimizer=dataclasses.replace(config.optimizer, name=optimizer),
    )


def products_table() -> str:
    base = quickstart.config()
    rows = []
    for name, config in (("MoE (quickstart)", base), ("dense twin", dense_twin(base))):
        compiled = Compiled(config)
        kinds = time_by_kind(compiled)
        milliseconds = [f"{kinds[part]:.0f}" for part in ("wall", "products", "other", "unattributed")]
        rows.append([name, *milliseconds, f"{kinds['products'] / kinds['wall']:.0%}"])
    header = ["step", "wall ms", "products ms", "other ms", "unattributed ms", "products / wall"]
    return environment.table(header, rows)


def twins_table() -> str:
    rows = []
    for batch_size in (8, 16, 32):
        moe = with_batch(quickstart.config(), batch_size, "adamw")
        dense = dense_twin(moe)
        times = milliseconds({"moe": Compiled(moe).step, "dense": Compiled(dense).step})
        tokens = batch_size * moe.data.sequence_length
        flops = 6 * active_parameters(moe) * tokens
        rows.append(
            [
                tokens,
                f"{times['moe']:.0f}",
                f"{times['dense']:.0f}",
                f"{times['moe'] / times['dense']:.2f}",
                f"{flops / times['moe'] / 1e6:.0f}",
                f"{flops / times['dense'] / 1e6:.0f}",
            ]
        )
    header = ["tokens per step", "MoE ms", "dense ms", "MoE / dense", "MoE GFLOP/s", "dense GFLOP/s"]
    return environment.table(header, rows)


def optimizers_table() -> str:
    rows = []
    base = quickstart.config()
    for name in ("adamw", "muon"):
        compiled = Compiled(with_batch(base, base.data.batch_size, name))
        times = milliseconds({"step": compiled.step, "gradients": compiled.gradients})
        share = max(1 - times["gradients"] / times["step"], 0)
        rows.append([name, f"{times['step']:.0f}", f"{times['gradients']:.0f}", f"{share:.0%}"])
    return environment.table(
        ["optimizer", "step ms", "forward and backward ms", "share of the optimizer"], rows
    )


def native_table() -> str:
    native_ops = Compiled(quickstart.config())
    with native.disabled():
        xla = Compiled(quickstart.config())
    times = milliseconds({"native": native_ops.step, "xla": xla.step})
    header = ["native ops ms", "plain XLA ms", "plain XLA / native"]
    ratio = f"{times['xla'] / times['native']:.2f}"
    return environment.table(header, [[f"{times['native']:.0f}", f"{times['xla']:.0f}", ratio]])


def main() -> None:
    keep_freed_memory()
    base = quickstart.config()
    total, active = ModelSpec.from_config(base, VOCAB).count_parameters()
    peak = milliseconds({"dense": jax.jit(lambda: jnp.ones((2048, 2048)) @ jnp.ones((2048, 2048)))})["dense"]
    text = "\n\n".join(
        [
            f"The quickstart: {total:,} parameters, {active:,} active, {base.data.batch_size} x"
            f" {base.data.sequence_length} tokens per step; its dense twin has as many active ones. One large dense"
            f" product in the same run: {2 * 2048**3 / peak / 1e6:.0f} GFLOP/s.",
            "Where a step's time goes (profiler, the optimizer included):",
            products_table(),
            "MoE against its dense twin, AdamW:",
            twins_table(),
            "The optimizer:",
            optimizers_table(),
            f"The quickstart's step without the native ops (library: {native.describe()}):",
            native_table(),
        ]
    )
    environment.save("train_step", "The cost of a train step", text)


if __name__ == "__main__":
    main()
