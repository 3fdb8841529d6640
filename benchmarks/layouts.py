"""Is the loss the same on every layout, by every exchange? Runs of `moejax train`, 50 f32 steps on up to 8 CPU devices.

    python -m benchmarks.layouts [--all]

Every row is a run of its own, as a user starts it: same seed, data (the embedded corpus) and config; warm-up of 50
steps and the balance loss over the global batch. The reference is one device. Without `--all` only the rows marked *,
and nothing is written.
"""

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
AT_ONCE = 2

OPTIONS = {
    "steps": STEPS,
    "model.num_layers": 2,
    "model.d_model": 64,
    "optimizer.warmup_steps": STEPS,
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


def train(run: Run, workdir: pathlib.Path) -> tuple[np.ndarray, int]:
    """Loss, auxiliary loss and gradient norm of every step, [STEPS, 3], and the most rounds of any."""
    command = [sys.executable, "-m", "train", "train", "quickstart", "--cpu-devices", str(run.devices)]
    command += ["--workdir", str(workdir), *run.words()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    lines = [line for line in read(workdir / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    sums = [[line[name] for name in ("loss", "aux_loss", "grad_norm")] for line in lines]
    return np.asarray(sums), int(max(line["moe/rounds"] for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--all", action="store_true", help="every row, and write results/layouts.md")
    everything = parser.parse_args().all
    runs = [run for run in (ONE, *RUNS) if everything or run.short]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        workdirs = [pathlib.Path(folder) / str(number) for number in range(len(runs))]
        results = list(pool.map(train, runs, workdirs))
    reference = results[0][0]
    rows: list[list[object]] = []
    for run, (result, rounds) in zip(runs, results, strict=True):
        mesh = ", ".join(f"{axis} {size}" for axis, size in run.mesh.items()) or "one device"
        moe = run.moe | ({"fsdp": "on"} if run.fsdp else {})
        exchange = moe.pop("exchange", "all_to_all") if run is not ONE else ""
        others = ", ".join(f"{name} {value}" for name, value in moe.items())
        worst = np.max(np.abs(result - reference) / np.abs(reference), axis=0)
        mark = "*" if run.short else ""
        differences = [f"{value:.1e}" for value in worst]
        rows.append([mesh + mark, exchange, others, rounds, f"{result[-1, 0]:.7f}", *differences])
    header = [
        "mesh",
        "exchange",
        "options",
        "most rounds",
        "loss of step 50",
        "loss",
        "auxiliary loss",
        "gradient norm",
    ]
    text = (
        f"`moejax train`, {STEPS} f32 steps; the last three columns are the largest relative difference from one "
        "device in any step.\n\n" + environment.table(header, rows)
    )
    if everything:
        environment.save("layouts", "The same loss on every layout, by every exchange", text)
    else:
        print(text)
    worst_loss = max(np.max(np.abs(result - reference)[:, 0] / reference[:, 0]) for result, _ in results)
    if not worst_loss <= TOLERANCE:
        raise SystemExit(f"the losses differ by {worst_loss:.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
