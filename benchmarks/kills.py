"""Is any work lost, or any bit changed, when processes of a run are killed at random moments?

    python -m benchmarks.kills [KILLS [FOLDER [SEED]]]

With a FOLDER the kills already done there count: 10, then 20, then 50 do in three parts what 50 does at once. Each part
ends with a run that has come to its last step. What has happened in all of them is written to results/kills.md.

One run in two processes, killed again and again with SIGKILL: one process or all, at a random moment or in the midst of
a checkpoint, and after every third kill with the newest checkpoint truncated or one of its bits flipped. Every time
the same command must go on from the newest complete and undamaged checkpoint, and every line of `metrics.jsonl` must be
that of an undisturbed run, to the last bit.

Every second start is with `checkpoint.wait`: a kill may then cost the interval, not one step more. Of the others it may
cost the steps more that were made while the checkpoint was being written that the kill cut short: as many as an
interval, for the next one waits for it.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from benchmarks.environment import save, table

STEPS, INTERVAL = 240, 5
BEGUN = re.compile(r"(?:going on after step|already finished: all) (\d+)")
HARMS = ("truncated", "flipped")
MODES = {True: "with checkpoint.wait", False: "without"}
MEASUREMENTS = ("tokens_per_second", "step_seconds", "mfu", "memory_bytes")
RUN = {
    "data.tokenizer": "char",
    "data.batch_size": 4,
    "data.sequence_length": 16,
    "model.num_layers": 2,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.moe.num_experts": 4,
    "model.moe.d_hidden": 8,
    "mesh.expert": 2,
    "checkpoint.every": INTERVAL,
    "checkpoint.keep_last": 3,
    "eval.every": 2 * INTERVAL,
    "eval.max_batches": 4,
    "log.every": 1,
    "log.tensorboard": "False",
}


def main(
    kills: int = 50, folder: str | None = None, seed: int = 1, steps: int = STEPS
) -> collections.Counter[str]:
    """Kill the run until there are so many kills in `folder`; how often what has happened there."""
    with contextlib.ExitStack() as stack:
        place = pathlib.Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        (place / "text.txt").write_text(
            " ".join(random.Random(0).choices("to be or not that is the question".split(), k=4000))
        )
        finish(command(place, "undisturbed", steps))
        expected = lines(place / "undisturbed")
        assert last_step(expected) == steps
        done = place / "kills.json"
        count = collections.Counter(json.loads(done.read_text()) if done.exists() else {})
        draw = random.Random(seed + count["kills"])
        shutil.rmtree(place / "disturbed", ignore_errors=True)
        victim = Victim(command(place, "disturbed", steps), place / "disturbed", expected, draw, count)
        while count["kills"] < kills:
            print(victim.one_kill(), flush=True)
        finish(victim.command)
        assert lines(victim.workdir) == expected, "the metrics differ"
        done.write_text(json.dumps(count))
        print(f"{kills} kills, {dict(count)}; {len(expected)} lines of metrics bitwise equal")
        return count


class Victim:
    """A run that is killed and started again."""

    def __init__(
        self,
        words: list[str],
        workdir: pathlib.Path,
        expected: list[str],
        draw: random.Random,
        count: collections.Counter[str],
    ):
        self.command, self.workdir = words, workdir
        self.expected, self.draw, self.count = expected, draw, count
        self.sound = 0  # the newest checkpoint that must be found
        self.damaged: set[str] = set()
        self.started = 0.0
        self.writing: set[int] = set()  # steps of checkpoints that were being written at the kill

    def one_kill(self) -> str:
        """Start the run, look where it goes on, kill it; what was done, in words."""
        log, waits = self.workdir / "log.txt", self.count["kills"] % 2 == 0
        self.started = time.time()
        before = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen(
            [*self.command, "--checkpoint.wait", str(waits)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        begun = BEGUN if self.sound else re.compile("run directory: ")
        wait(process, lambda: begun.search(tail(log, before)))
        went_on = BEGUN.search(tail(log, before))
        begun_at = int(went_on[1]) if went_on else 0
        assert begun_at == self.sound, f"went on from {begun_at}, not {self.sound}"
        moment = self.draw.choice(["start", "step", "step", "write", "write"])
        if moment != "start":  # programs are compiled first
            wait(process, lambda: last_step(lines(self.workdir)) > begun_at)
        if moment == "write":
            wait(process, self.pending)
            time.sleep(self.draw.uniform(0, 0.3))
        else:
            time.sleep(self.draw.uniform(0, 3))
        who = self.draw.choice(["process 0", "process 1", "all", "all"])
        self.kill(process, who)
        now = lines(self.workdir)
        assert now == self.expected[: len(now)], "the metrics differ"
        if process.returncode == 0:  # it was faster than the kill: the next run begins at step 0
            assert now == self.expected, "lines are missing"
            shutil.rmtree(self.workdir)
            self.sound = 0
            self.damaged.clear()
            return f"on from {begun_at}, done at {last_step(now)}"
        self.count["kills"] += 1
        complete = self.complete()
        self.sound = max(complete, default=0)
        made = last_step(now)
        lost = made - self.sound
        while_writing = made - min(self.writing - {*complete}, default=made)
        assert lost <= INTERVAL + while_writing, f"{lost} steps lost, {while_writing} of them during a write"
        assert while_writing <= (0 if waits else INTERVAL), f"{while_writing} steps during a write"
        self.count[f"{MODES[waits]}: {lost} steps"] += 1
        self.count["most steps during a write"] = max(self.count["most steps during a write"], while_writing)
        harm = "none"
        done = sum(self.count[f"newest checkpoint: {kind}"] for kind in HARMS)
        if done < self.count["kills"] // 3 and len(complete) > 1:
            harm = HARMS[done % 2]
            self.damage(complete.pop(), harm)
            self.sound = max(complete)
        for what in (f"during: {moment}", f"killed: {who}", f"newest checkpoint: {harm}"):
            self.count[what] += 1
        what = f"{MODES[waits]}, on from {begun_at}, killed {who} at {made} ({moment}), {lost} steps lost"
        return f"{self.count['kills']:3}: {what}, newest checkpoint: {harm}"

    def kill(self, process: subprocess.Popen[bytes], who: str) -> None:
        """SIGKILL to one process of the run, or to all and the launcher; none may be left afterwards."""
        workers = children(process.pid)
        if process.poll() is None and len(workers) == 2:
            chosen = {"process 0": workers[:1], "process 1": workers[1:], "all": [process.pid, *workers]}[who]
            self.writing = self.pending()
            for pid in chosen:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.writing |= self.pending()
        began = time.monotonic()
        code = process.wait(timeout=180)
        wait(None, lambda: not any(is_alive(pid) for pid in workers), 60)
        self.count["longest seconds until all had ended"] = max(
            self.count["longest seconds until all had ended"], round(time.monotonic() - began)
        )
        assert code in (0, 3, -signal.SIGKILL), f"the launcher ended with {code}"

    def pending(self) -> set[int]:
        """Steps of the checkpoints that this start is writing; what earlier ones have left is older."""
        steps = set()
        for path in (self.workdir / "checkpoints").glob(".pending-*"):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime >= self.started:
                    steps.add(int(path.name.removeprefix(".pending-")))
        return steps

    def complete(self) -> list[int]:
        """Steps of the complete checkpoints without damage; one that was damaged counts again once it is replaced."""
        paths = (self.workdir / "checkpoints").glob("[0-9]*")
        return sorted(int(path.name) for path in paths if identity(path) not in self.damaged)

    def damage(self, step: int, harm: str) -> None:
        """Truncate a file of this checkpoint or flip one bit of it."""
        files = [path for path in (self.workdir / "checkpoints" / str(step)).rglob("*") if path.is_file()]
        path = self.draw.choice(sorted(path for path in files if path.stat().st_size))
        content = bytearray(path.read_bytes())
        if harm == "truncated":
            del content[len(content) // 2 :]
        else:
            content[self.draw.randrange(len(content))] ^= 1 << self.draw.randrange(8)
        path.write_bytes(content)
        self.damaged.add(identity(path.parents[len(path.parts) - len(self.workdir.parts) - 3]))


def command(place: pathlib.Path, name: str, steps: int) -> list[str]:
    options = {"data.path": place / "text.txt", "workdir": place / name, "steps": steps, **RUN}
    words = [word for field, value in options.items() for word in (f"--{field}", str(value))]
    launch = ["launch", "--processes", "2", "--devices-per-process", "1"]
    return [sys.executable, "-m", "train", *launch, "train", "quickstart", *words]


def finish(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def lines(workdir: pathlib.Path) -> list[str]:
    """The whole lines of the metrics, without what is measured."""
    path = workdir / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in whole]
    return [
        json.dumps({name: value for name, value in record.items() if name not in MEASUREMENTS})
        for record in records
    ]


def last_step(records: list[str]) -> int:
    return json.loads(records[-1])["step"] if records else 0


def identity(checkpoint: pathlib.Path) -> str:
    """Of this very folder, not of one that takes its place; its files may change."""
    return f"{checkpoint.name} {checkpoint.stat().st_ctime_ns}"


def tail(path: pathlib.Path, offset: int) -> str:
    return path.read_bytes()[offset:].decode() if path.exists() else ""


def wait(process: subprocess.Popen[bytes] | None, condition, seconds: float = 600) -> None:
    """Until the condition holds or the process has ended."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            return
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
    return sorted(int(word) for word in found.stdout.split())


def is_alive(pid: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def page(count: collections.Counter[str]) -> str:
    """What has happened, as Markdown."""
    each = lambda kind, *names: ", ".join(str(count[f"{kind}: {name}"]) for name in names)  # noqa: E731
    rows: list[list[object]] = [
        ["in all", count["kills"]],
        [
            "of process 0, of process 1, of all and the launcher",
            each("killed", "process 0", "process 1", "all"),
        ],
        [
            "before the first step, during steps, during a checkpoint",
            each("during", "start", "step", "write"),
        ],
        [
            "after which the newest checkpoint was truncated, or one of its bits flipped",
            each("newest checkpoint", *HARMS),
        ],
    ]
    costs = [
        [mode, *(count[f"{mode}: {lost} steps"] for lost in range(2 * INTERVAL + 1))]
        for mode in MODES.values()
    ]
    return f"""\
Two processes of one CPU device each, a checkpoint every {INTERVAL} steps. After every kill the same command went on
from the newest checkpoint that was complete and undamaged, and all metrics were bitwise those of the undisturbed run.

{table(["", "kills"], rows)}

How many kills cost how many steps, without what a damaged checkpoint costs besides: at most {INTERVAL} with
`checkpoint.wait`, at most {INTERVAL} and those made during the write that was cut short without it.

{table(["steps", *map(str, range(2 * INTERVAL + 1))], costs)}

Most steps made during a write that was cut short: {count["most steps during a write"]}. Longest time from a kill until
the last process had ended: {count["longest seconds until all had ended"]} s."""


if __name__ == "__main__":
    counted = main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 50,
        sys.argv[2] if len(sys.argv) > 2 else None,
        int(sys.argv[3]) if len(sys.argv) > 3 else 1,
    )
    save("kills", "Runs killed again and again", page(counted))
