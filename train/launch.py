"""`moejax launch`: the processes of one run on this machine, for several GPUs or for trying out a cluster run.

On a cluster the scheduler starts them (see docs/clusters.md).
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType

from train.clock import now
from train.config_io import find_config
from train.errors import OthersLost, RunError, TrainingFailed
from train.paths import expanded
from train.place import COORDINATOR, DEVICES, LAUNCHER, NEIGHBOURS, PROCESS_ID, PROCESSES
from train.streams import say
from train.words import Words, take_apart

GRACE_SECONDS = 15
"""How long the others may take to end after one has died, before they are killed."""
LAST_LINES = 8
"""Lines of a dead process that are shown."""

_START = pathlib.Path(__file__).resolve().parent.parent / "moejax_cli" / "__init__.py"
# Exit codes of processes that a signal has stopped in order: all of them are about to end by themselves.
_STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
# How a process ends because another one has: by jax's runtime, or as `OthersLost`.
_VICTIM = (-signal.SIGABRT, OthersLost.exit_code)
# Gloo writes this to stdout for each group of processes that it connects.
_NOISE = "[Gloo] Rank "


class StoppedAtOnce(RunError):
    """The same signal came twice: all processes were killed, the last complete checkpoint is intact."""

    def __init__(self, number: int):
        self.exit_code = 128 + number
        super().__init__(
            f"stopped at once by signal {number}; the same command goes on from the last checkpoint"
        )


class Worker:
    """One process of the run. The first one shows its output; that of the others goes to a file.

    Args:
      number: its place among the processes.
      command: what it runs.
      environment: its whole environment.
      log: where its output goes once the run's directory is there, for nothing is written before the input is sound.
        None: nowhere. That of number 0 goes to the terminal, its stdout without the lines of `_NOISE`.
    """

    def __init__(
        self, number: int, command: Sequence[str], environment: Mapping[str, str], log: pathlib.Path | None
    ):
        self.number, self.log = number, log
        self.was_left = False  # it still ran when the others had ended for its sake
        self.last_lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        # A group of its own: Ctrl-C reaches the launcher alone, which passes it on once.
        self.process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if number else None,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read if number else self._show, daemon=True)
        self._reader.start()

    def _show(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.startswith(_NOISE):
                # Whatever becomes of our own output: a process whose output nobody reads stops.
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.write(line)
                    sys.stdout.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        waiting: list[str] = []
        for line in itertools.chain(self.process.stdout, [""]):
            if line and not line.startswith(_NOISE):
                self.last_lines.append(line.rstrip())
            waiting.append(line)
            # Whatever the disk says: a process whose output nobody reads stops.
            with contextlib.suppress(OSError):
                if self.log is not None and self.log.parent.parent.is_dir():
                    self.log.parent.mkdir(exist_ok=True)
                    with self.log.open("a", encoding="utf-8") as file:
                        file.writelines(waiting)
                    waiting.clear()

    def signal(self, number: int) -> None:
        """Pass a signal on to the process and what it started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def end(self) -> int:
        """Wait for it and for all it wrote; the exit code as a shell gives it."""
        code = self.process.wait()
        self._reader.join()
        if self.process.stdout:
            self.process.stdout.close()
        return 128 - code if code < 0 else code


def launch(words: Sequence[str], processes: int, devices: int | None) -> int:
    """Run `moejax WORDS` in several processes and wait for them all.

    When one fails, the others are stopped: they could not go on without it.

    Args:
      words: a command line of `moejax`, such as `train quickstart --workdir runs/here`.
      processes: how many.
      devices: CPU devices of each; unset: one GPU each, or what a process finds without GPUs.

    Returns:
      0; 2 for bad input; 128 + signal when the run was stopped by one, after a checkpoint.

    Raises:
      StoppedAtOnce: the same signal came again.
      TrainingFailed: a process died; names it and shows its last lines.
    """
    coordinator = f"127.0.0.1:{_free_port()}"
    # Not `-m train`, and with -P: a train.py in the current folder must never run in its place.
    command = [sys.executable, "-P", str(_START), *words]
    if devices is not None:
        command += ["--cpu-devices", str(devices)]
    logs = _log_folder(words)
    workers: list[Worker] = []
    with _passing_signals_on(workers) as all_have_started:
        for number in range(processes):
            environment = os.environ | {
                COORDINATOR: coordinator,
                PROCESSES: str(processes),
                PROCESS_ID: str(number),
                LAUNCHER: str(os.getpid()),
            }
            if devices is None:
                environment[NEIGHBOURS] = str(processes)  # each takes one of the GPUs
            else:
                environment[DEVICES] = str(devices)
            log = logs / f"process-{number}.txt" if logs else None
            workers.append(Worker(number, command, environment, log))
        all_have_started()
        dead = _wait_for_first_failure(workers)
        if dead is not None and dead.process.returncode not in _STOPPED:
            dead = _stop_all(workers, dead)
        codes = [worker.end() for worker in workers]
    if dead is None:
        return 0
    code = codes[dead.number]
    if code == 2 or code in _STOPPED:
        if dead.number and codes[0] != code:  # process 0 has said it itself
            say("\n".join(dead.last_lines))
        return code
    shown = "".join(f" | {line}" for line in dead.last_lines)
    how = "did not end when the others had, and was killed" if dead.was_left else f"ended with code {code}"
    raise TrainingFailed(f"process {dead.number} of {processes} {how}{shown}")


@contextlib.contextmanager
def _passing_signals_on(workers: Sequence[Worker]) -> Iterator[Callable[[], None]]:
    """Within the block the workers get what this process gets: to stop, to be suspended. At its end they are killed.

    Signals wait until the function that it gives is called: one that comes between two starts would miss the second.

    Raises:
      StoppedAtOnce: the same signal came again.
    """
    asked: set[int] = set()

    def pass_on(number: int, _: FrameType | None) -> None:
        # jax listens for SIGTERM only, and tells all processes once one has it.
        again = number in asked and number != signal.SIGUSR1
        asked.add(number)
        if not again and number != signal.SIGUSR1:
            message = f"signal {number}: a checkpoint is written; the same again stops at once\n"
            # Not print: the signal may have come while a line is written. After Ctrl-C what reads us may be gone.
            with contextlib.suppress(OSError):
                os.write(2, message.encode())
        for worker in workers:
            worker.signal(signal.SIGKILL if again else signal.SIGTERM)
        if again:
            raise StoppedAtOnce(number)

    def suspend(*_: object) -> None:
        # Ctrl-Z. The workers have groups of their own, so they would go on and fill a pipe that nobody empties.
        with _woken_at_the_end(workers):
            for worker in workers:
                worker.signal(signal.SIGSTOP)
            os.kill(os.getpid(), signal.SIGSTOP)

    handlers = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), pass_on) | {
        signal.SIGTSTP: suspend
    }
    came: list[int] = []
    previous = {number: signal.signal(number, lambda number, _: came.append(number)) for number in handlers}

    def all_have_started() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for missed in came:
            signal.raise_signal(missed)

    try:
        yield all_have_started
    finally:
        for worker in workers:
            worker.signal(signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _woken_at_the_end(workers: Sequence[Worker]) -> Iterator[None]:
    """Let the workers go on when the block ends, also when it ends with this process.

    The SIGTERM that they then get waits for as long as they are suspended, so a guardian wakes them: it reads a pipe
    whose other end this process alone holds.
    """
    groups = [str(worker.process.pid) for worker in workers if worker.process.poll() is None]
    script = 'read _; for group; do kill -s CONT -- "-$group"; done'
    with subprocess.Popen(
        ["sh", "-c", script, "sh", *groups],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-Z does not reach it
    ):
        yield


def _wait_for_first_failure(workers: Sequence[Worker]) -> Worker | None:
    """The first worker to end with anything but 0; None when all end well."""
    while True:
        codes = [worker.process.poll() for worker in workers]
        for worker, code in zip(workers, codes, strict=True):
            if code not in (0, None):
                return worker
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _stop_all(workers: Sequence[Worker], first: Worker) -> Worker:
    """Let the others find out by themselves, then end them: nobody may be left behind.

    Returns:
      The one that is the cause. It need not be the `first` that was seen to end: the kernel closes a process's
      connections before it tells the parent that it has ended, so its victims may be faster.
    """
    deadline = now() + GRACE_SECONDS
    while now() < deadline and any(worker.process.poll() is None for worker in workers):
        time.sleep(0.05)
    left = [worker for worker in workers if worker.process.poll() is None]
    ended = [worker for worker in (first, *workers) if worker.process.poll() not in (0, None, *_STOPPED)]
    for worker in workers:
        worker.signal(signal.SIGKILL)
    cause = min(ended, key=lambda worker: _likelihood(worker.process.returncode))
    if left and cause.process.returncode in _VICTIM:
        cause = left[0]
        cause.was_left = True
    return cause


def _likelihood(code: int) -> int:
    """The lower, the likelier a process that ended so is the cause: killed or crashed, failed, a victim."""
    return 2 if code in _VICTIM else int(code > 0)


def _log_folder(words: Sequence[str]) -> pathlib.Path | None:
    """`logs` in the run's directory, which the command line or the config names; None where neither does."""
    parts = Words()
    take_apart(list(words), parts)
    workdir = parts.options.get("workdir")
    with contextlib.suppress(RunError):  # the workers say what is wrong
        if workdir is None and len(parts.arguments) > 1:
            workdir = find_config(parts.arguments[1])[0].workdir
        return None if workdir is None else expanded("workdir", workdir) / "logs"
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
