"""Is the loss the same on every layout, by every exchange? Runs of `moejax train`, 50 f32 steps on up to 8 CPU devices.

    python -m benchmarks.layouts [--all] [--folder DIR]

Every row is a run of its own, as a user starts it: same seed, data (the embedded corpus) and config; warm-up of 50
steps and the balance loss over the global batch. The reference is one device. Without `--all` only the rows marked *,
and nothing is written. In a `--folder` the runs are kept, and those that it has are not run again.

All losses of a run must agree with those of one device, or all up to the first step in which a choice of an expert
falls out differently, that step included: where two scores of a router differ by less than rounding does, another order
of summation may take the other expert, and from there on the runs train on different choices. In that step no more than
`MOST_FLIPS` choices may differ. What is counted are the loads of all experts of all layers.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from benchmarks import environment
from train.metrics import read

STEPS = 50
TOLERANCE = 1e-5  # relative, of every loss
MOST_FLIPS = 2  # of 8,192 choices of a step
AT_ONCE = 2

OPTIONS = {
    "steps": STEPS,
    "model.num_layers": 2,
    "model.d_model": 64,
    "optimizer.warmup_steps": STEPS,
    "data.validation_path": textwrap.__file__,  # short: only the run's steps are compared
    "log.every": 1,
    "log.experts_every": 1,
    "log.tensorboard": False,
    "checkpoint.every": 0,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """One row: sizes of mesh axes, options of `model.moe`, whether it is among the few of the short table."""

    mesh: dict[str, int]
    moe: dict[str, object] = dataclasses.field(default_factory=dict)
    fsdp: bool = False
    short: bool = False

    @property
    def devices(self) -> int:
        return int(np.prod(list(self.mesh.values()), dtype=int))

    def words(self) -> list[str]:
        """The options on the command line."""
        mesh = {f"mesh.{axis}": size for axis, size in self.mesh.items()}
        moe = {f"model.moe.{name}": value for name, value in self.moe.items()}
        options = OPTIONS | mesh | moe | {"mesh.fsdp": self.fsdp}
        return [word for name, value in options.items() for word in (f"--{name}", str(value))]


# Buffers of 1.15 have further rounds; without a factor a CPU has room for all.
TIGHT = {"capacity_factor": 1.15}
ONE = Run({}, short=True)
RUNS = [
    Run({"data": 8}),
    Run({"expert": 2}, TIGHT),
    Run({"expert": 4}, {"exchange": "all_gather", **TIGHT}),
    Run({"expert": 8}),
    Run({"expert": 8}, {"exchange": "ragged", **TIGHT}, short=True),
    Run({"expert": 4}, {"exchange": "auto", "chunks": 2, **TIGHT}),
    Run({"expert_node": 2, "expert": 2}, {"chunks": 2, **TIGHT}),
    Run({"expert_node": 2, "expert": 2}, {"exchange": "all_gather", "shadow": 2}),
    Run({"expert_node": 2, "expert": 4}, {"shadow": 2, **TIGHT}, short=True),
    Run({"expert_node": 2, "expert": 4}, {"exchange": "ragged", "chunks": 2, **TIGHT}),
    Run({"data": 2, "expert": 4}, {"shadow": 2, "chunks": 2, **TIGHT}),
    Run({"data": 4, "expert": 2}, {"exchange": "all_gather", "chunks": 2}, short=True),
    Run({"tensor": 2}, {}),
    Run({"expert": 2, "tensor": 2}, TIGHT),
    Run({"data": 2, "expert": 2}, TIGHT, fsdp=True),
    Run(
        {"data": 2, "expert": 2, "tensor": 2},
        {"exchange": "auto", "shadow": 2, **TIGHT},
        fsdp=True,
        short=True,
    ),
]


class Result:
    """The metrics of every step of a run."""

    def __init__(self, workdir: pathlib.Path):
        self.lines = [line for line in read(workdir / "metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in self.lines] == list(range(1, STEPS + 1))

    def of_steps(self, *names: str) -> np.ndarray:
        """[STEPS, names, ...]"""
        return np.asarray([[line[name] for name in names] for line in self.lines])

    def compare(self, reference: Result) -> tuple[int, int, np.ndarray]:
        """Steps that are compared, choices that differ in the last of them, and the largest differences, [3].

        Relative ones: of loss, auxiliary loss and gradient norm.
        """
        mine, other = (run.of_steps("loss", "aux_loss", "grad_norm") for run in (self, reference))
        differences = np.abs(mine - other) / np.abs(other)
        steps, flips = STEPS, 0
        if not differences[:, 0].max() <= TOLERANCE:
            loads, others = (run.of_steps("moe/layers/load")[:, 0] for run in (self, reference))
            flips_of_steps = np.abs(loads - others).sum(axis=(1, 2)) // 2
            if flips_of_steps.any():
                steps = int(np.argmax(flips_of_steps > 0)) + 1
                flips = int(flips_of_steps[steps - 1])
        return steps, flips, differences[:steps].max(axis=0)


def train(run: Run, workdir: pathlib.Path) -> Result:
    """Start the command, unless that has been done, and read what it wrote."""
    metrics = workdir / "metrics.jsonl"
    if metrics.exists() and any("eval/loss" in line for line in read(metrics)):  # the end of a run
        return Result(workdir)
    command = [sys.executable, "-m", "train", "train", "quickstart", "--cpu-devices", str(run.devices)]
    command += ["--workdir", str(workdir), *run.words()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return Result(workdir)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every row, and write results/layouts.md")
    parser.add_argument("--folder", type=pathlib.Path, help="keep the runs here")
    args = parser.parse_args()
    runs = {0: ONE} | {number: run for number, run in enumerate(RUNS, 1) if args.all or run.short}
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(AT_ONCE) as pool:
        folder = args.folder or pathlib.Path(scratch)
        results = list(pool.map(train, runs.values(), [folder / str(number) for number in runs]))
    rows: list[list[object]] = []
    wrong = []
    for run, result in zip(runs.values(), results, strict=True):
        steps, flips, worst = result.compare(results[0])
        mesh = ", ".join(f"{axis} {size}" for axis, size in run.mesh.items()) or "one device"
        moe = run.moe | ({"fsdp": "on"} if run.fsdp else {})
        exchange = moe.pop("exchange", "all_to_all") if run is not ONE else ""
        others = ", ".join(f"{name} {value}" for name, value in moe.items())
        differences = [f"{value:.1e}" for value in worst]
        final, rounds = result.lines[-1]["loss"], max(line["moe/rounds"] for line in result.lines)
        mark = "*" if run.short else ""
        rows.append([mesh + mark, exchange, others, rounds, f"{final:.7f}", steps, flips, *differences])
        if not worst[0] <= TOLERANCE or flips > MOST_FLIPS:
            wrong.append(f"{mesh} {exchange} {others}: {worst[0]:.1e} in {steps} steps, {flips} choices")
    header = ["mesh", "exchange", "options", "most rounds", f"loss of step {STEPS}", "steps compared"]
    header += ["choices that differ in the last", "loss", "auxiliary loss", "gradient norm"]
    text = (
        f"`moejax train`, {STEPS} f32 steps, compared with one device: in all steps, or where the losses part, up to "
        "the first step in which rounding makes a choice of an expert fall out differently. The last three columns are "
        "the largest relative differences.\n\n"
    ) + environment.table(header, rows)
    if args.all:
        environment.save("layouts", "The same loss on every layout, by every exchange", text)
    else:
        print(text)
    if wrong:
        raise SystemExit(f"more than {TOLERANCE:.0e}, or {MOST_FLIPS} choices:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
