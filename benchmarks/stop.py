"""How long a run takes to end: after SIGTERM, with a complete checkpoint, and after the loss of one process.

    python -m benchmarks.stop

The quickstart, stopped by SIGTERM in one process and in two, and with one of two processes killed. What counts is the
time until the last process has ended.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from benchmarks import environment
from benchmarks.kills import children, is_alive, wait

STEP = 8
MAX_STOP_SECONDS, MAX_LOSS_SECONDS = 15, 60


def main() -> None:
    rows: list[list[object]] = []
    for what, processes, is_killed in (
        ("SIGTERM", 1, False),
        ("SIGTERM", 2, False),
        ("kill -9 of a process", 2, True),
    ):
        with tempfile.TemporaryDirectory() as folder:
            code, seconds, newest = measure(pathlib.Path(folder), processes, is_killed)
        assert code == (3 if is_killed else 143), f"ended with {code}"
        assert seconds <= (MAX_LOSS_SECONDS if is_killed else MAX_STOP_SECONDS), f"took {seconds} s"
        rows.append([what, processes, code, f"{seconds:.1f}", newest])
    header = ["what happens", "processes", "exit code", "seconds until all have ended", "newest checkpoint"]
    environment.save("stop", "How long the quickstart takes to end", environment.table(header, rows))


def measure(folder: pathlib.Path, processes: int, is_killed: bool) -> tuple[int, float, str]:
    """Exit code, seconds until all have ended, and the step of the newest complete checkpoint."""
    command = [sys.executable, "-m", "train"]
    if processes > 1:
        command += ["launch", "--processes", str(processes), "--devices-per-process", "1"]
    command += ["train", "quickstart", "--workdir", str(folder / "run")]
    process = subprocess.Popen(
        [*command, "--log.every", "1", "--checkpoint.every", "5"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = folder / "run" / "metrics.jsonl"
    wait(process, lambda: metrics.exists() and f'"step": {STEP},' in metrics.read_text())
    workers = children(process.pid) if processes > 1 else []
    began = time.perf_counter()
    os.kill(workers[1] if is_killed else process.pid, signal.SIGKILL if is_killed else signal.SIGTERM)
    code = process.wait()
    wait(None, lambda: not any(is_alive(pid) for pid in workers))
    seconds = time.perf_counter() - began
    steps = [int(path.name) for path in (folder / "run" / "checkpoints").glob("[0-9]*")]
    return code, seconds, f"step {max(steps, default=0)}"


if __name__ == "__main__":
    main()
