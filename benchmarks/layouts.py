"""Is the loss the same on every layout, by every exchange? Runs of `moejax train`, 50 f32 steps on up to 8 CPU devices.

    python -m benchmarks.layouts [--all] [--folder DIR]

Every row is a run of its own, as a user starts it: same seed, data (the embedded corpus) and config; warm-up of 50
steps and the balance loss over the global batch. The reference is one device; every loss of every run must agree with
its. Without `--all` only the rows marked *, and nothing is written. In a `--folder` the runs are kept by a hash of
their options, and those that it has are not run again.

Batches are small, 1,024 choices of an expert in a layer and step: where two scores of a router differ by less than
rounding does, another order of summation takes the other expert, and from there on two runs train on different choices.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
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
AT_ONCE = 2

OPTIONS = {
    "steps": STEPS,
    "model.num_layers": 2,
    "model.d_model": 64,
    "optimizer.warmup_steps": STEPS,
    "data.batch_size": 8,
    "data.sequence_length": 64,
    "data.validation_path": textwrap.__file__,  # short: only the run's steps are compared
    "log.every": 1,
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

    def folder(self) -> str:
        """Where it is kept."""
        return hashlib.sha256(" ".join(self.words()).encode()).hexdigest()[:12]


ONE = Run({}, short=True)
RUNS = [
    Run({"data": 8}),
    Run({"expert": 2}),
    Run({"expert": 4}, {"exchange": "all_gather"}),
    Run({"expert": 4}, {"exchange": "auto", "chunks": 2}),
    Run({"expert": 8}, {"capacity_factor": 8.0}),  # room for whatever may arrive
    Run({"expert": 8}, {"exchange": "ragged"}, short=True),
    Run({"expert_node": 2, "expert": 2}, {"chunks": 2, "capacity_factor": 0.5}),
    Run({"expert_node": 2, "expert": 2}, {"exchange": "all_gather", "shadow": 2}),
    Run({"expert_node": 2, "expert": 4}, {"shadow": 2}, short=True),
    Run({"expert_node": 2, "expert": 4}, {"exchange": "ragged", "chunks": 2}),
    Run({"data": 2, "expert": 4}, {"shadow": 2, "chunks": 2}),
    Run({"data": 4, "expert": 2}, {"exchange": "all_gather", "chunks": 2}, short=True),
    Run({"tensor": 2}),
    Run({"expert": 2, "tensor": 2}),
    Run({"data": 2, "expert": 2}, fsdp=True),
    Run({"data": 2, "expert": 2, "tensor": 2}, {"exchange": "auto", "shadow": 2}, fsdp=True, short=True),
]


class Result:
    """The metrics of every step of a run."""

    def __init__(self, workdir: pathlib.Path):
        self.lines = [line for line in read(workdir / "metrics.jsonl") if "loss" in line]
        assert [line["step"] for line in self.lines] == list(range(1, STEPS + 1))

    def compare(self, reference: Result) -> np.ndarray:
        """Largest relative differences of loss, auxiliary loss and gradient norm in any step, [3]."""
        names = ("loss", "aux_loss", "grad_norm")
        mine, other = (
            np.asarray([[line[name] for name in names] for line in run.lines]) for run in (self, reference)
        )
        return (np.abs(mine - other) / np.abs(other)).max(axis=0)


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
    runs = [ONE, *(run for run in RUNS if args.all or run.short)]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(AT_ONCE) as pool:
        folder = args.folder or pathlib.Path(scratch)
        results = list(pool.map(train, runs, [folder / run.folder() for run in runs]))
    rows: list[list[object]] = []
    wrong = []
    for run, result in zip(runs, results, strict=True):
        worst = result.compare(results[0])
        mesh = ", ".join(f"{axis} {size}" for axis, size in run.mesh.items()) or "one device"
        moe = run.moe | ({"fsdp": "on"} if run.fsdp else {})
        exchange = moe.pop("exchange", "all_to_all") if run is not ONE else ""
        others = ", ".join(f"{name} {value}" for name, value in moe.items())
        differences = [f"{value:.1e}" for value in worst]
        final, rounds = result.lines[-1]["loss"], max(line["moe/rounds"] for line in result.lines)
        mark = "*" if run.short else ""
        rows.append([mesh + mark, exchange, others, rounds, f"{final:.7f}", *differences])
        if not worst[0] <= TOLERANCE:
            wrong.append(f"{mesh} {exchange} {others}: {worst[0]:.1e}")
    header = ["mesh", "exchange", "options", "most rounds", f"loss of step {STEPS}"]
    header += ["loss", "auxiliary loss", "gradient norm"]
    text = (
        f"`moejax train`, {STEPS} f32 steps, compared with one device; the last three columns are the largest relative "
        "differences in any step.\n\n"
    ) + environment.table(header, rows)
    if args.all:
        environment.save("layouts", "The same loss on every layout, by every exchange", text)
    else:
        print(text)
    if wrong:
        raise SystemExit(f"more than {TOLERANCE:.0e}:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
