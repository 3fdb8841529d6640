"""How long from a signal, or from the death of a process, until a run of the quickstart's model has ended?

    python -m benchmarks.stopping

SIGTERM during a step, in the midst of the last evaluation and while a checkpoint is written, to a run in one process
and to one in two: until it has ended with code 143 and a complete checkpoint. SIGKILL to one of two processes: until
all have ended, with code 3 and a sound checkpoint. It fails where one takes longer than SIGNALLED or KILLED seconds.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from benchmarks import environment
from benchmarks.kills import children, is_alive, lines, wait
from train.integrity import find_fault

SIGNALLED, KILLED = 15, 60
"""Seconds within which all must have ended."""
STEP = 10
"""What happens, happens after this step or during it."""


def main() -> None:
    rows: list[list[object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for moment in MOMENTS:
            runs = [Run(pathlib.Path(folder), processes, moment) for processes in (1, 2)]
            rows.append([f"SIGTERM during {moment}", *(f"{run.signalled():.1f}" for run in runs), SIGNALLED])
        for number in range(2):
            run = Run(pathlib.Path(folder) / str(number), 2, "a step")
            rows.append([f"SIGKILL to process {number}", "", f"{run.killed(number):.1f}", KILLED])
    table = environment.table(["seconds until all had ended", "1 process", "2 processes", "goal"], rows)
    codes = "After SIGTERM with code 143 and a complete checkpoint, after SIGKILL with 3 and a sound one."
    load = f"The machine's load in the last minute of it was {os.getloadavg()[0]:.1f}."
    environment.save("stopping", "From a signal or a death to the end", f"{table}\n\n{codes} {load}")


class Run:
    """One run of the quickstart's model, which is stopped at a moment."""

    def __init__(self, folder: pathlib.Path, processes: int, moment: str):
        self.workdir = folder / f"{moment} {processes}"
        self.output = folder / f"{moment} {processes}.txt"
        self.options, self.has_come = MOMENTS[moment]
        self.processes = processes

    def signalled(self) -> float:
        """Seconds from SIGTERM to the end."""
        seconds, code = self.ended(lambda process: process.send_signal(signal.SIGTERM))
        assert code == 143, self.output.read_text()
        step = re.findall(r"stopped by signal 15 after step (\d+)", self.output.read_text())[-1]
        assert find_fault(self.workdir / "checkpoints" / step) is None
        assert not any("eval/loss" in line for line in lines(self.workdir)), "the evaluation was over by then"
        assert seconds <= SIGNALLED, f"{seconds:.1f} s"
        return seconds

    def killed(self, number: int) -> float:
        """Seconds from the death of one process until the others and the launcher have ended."""
        seconds, code = self.ended(lambda process: os.kill(children(process.pid)[number], signal.SIGKILL))
        assert code == 3 and f"process {number} of 2 ended with code 137" in self.output.read_text()
        newest = max((self.workdir / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
        assert find_fault(newest) is None
        assert seconds <= KILLED, f"{seconds:.1f} s"
        return seconds

    def ended(self, act: Callable[[subprocess.Popen[bytes]], None]) -> tuple[float, int]:
        """Start it, `act` when the moment has come; the seconds from then until all has ended, and the exit code."""
        words = ["train", "quickstart", "--workdir", str(self.workdir), *self.options]
        if self.processes == 1:
            words += ["--cpu-devices", "1"]
        else:
            words = ["launch", "--processes", str(self.processes), "--devices-per-process", "1", *words]
        self.output.parent.mkdir(exist_ok=True)
        with self.output.open("w") as output:
            command = [sys.executable, "-m", "train", *words]
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        wait(process, lambda: self.has_come(self.workdir))
        workers, began = children(process.pid), time.monotonic()
        act(process)
        code = process.wait(timeout=300)
        wait(None, lambda: not any(is_alive(pid) for pid in workers))
        return time.monotonic() - began, code


def has_done(workdir: pathlib.Path) -> bool:
    """Whether STEP steps have been reported, and a second more has passed."""
    if max((json.loads(line)["step"] for line in lines(workdir)), default=0) < STEP:
        return False
    time.sleep(1)
    return True


def is_writing(workdir: pathlib.Path) -> bool:
    return any((workdir / "checkpoints").glob(".pending-*"))


# What the run is given so that the moment comes, and how it is known that it has.
MOMENTS = {
    "a step": (("--checkpoint.every", str(STEP // 2)), has_done),
    "the last evaluation": (("--steps", str(STEP)), has_done),  # over the whole split, most of a minute
    "a checkpoint's write": (("--checkpoint.every", str(STEP)), is_writing),
}

if __name__ == "__main__":
    main()
