"""A step that never ends: every process says which step it has begun, those that did not arrive are named, all end.

The scheduler, or the user, runs the same command again, which goes on from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType

import jax

from train import clock, processes
from train.ending import begin_to_end, end_at_once
from train.errors import RunError, TrainingFailed

KEPT = 64
"""Number of step times; the limit goes by their median."""
NEEDED = 3
"""Step times without which nothing counts as too long."""
POLL_SECONDS = 1.0
WRITE_SECONDS = 10.0
"""How long the stacks may take to be written: the step may wait for the very disk that they go to."""
MEETING_SECONDS = 5.0
"""How long a process that gives up waits for the others to say where they are."""
REPORT_SECONDS = WRITE_SECONDS + 3 * MEETING_SECONDS
"""How long it may take to give up: the coordinator may not answer either."""

_TOPIC = "standing"


class Watchdog:
    """A thread in each process that ends it when the steps stop coming.

    The loop tells it which steps it has begun and which ones the device has finished. The device is late when the
    steps that it has begun take longer than `factor` times the median, and longer than `seconds`. Time in which the
    process was suspended does not count.

    Args:
      workdir: the stacks go to `logs/stacks-<process>.txt` there, and to the process's own output.
      factor: how many times the median of a step is too long; 0: nothing is watched.
      seconds: what is never too long.
      end: is given the error that ends the process; replaced in tests.
    """

    def __init__(
        self, workdir: Path, *, factor: float, seconds: float, end: Callable[[RunError], None] = end_at_once
    ):
        self._path = workdir / "logs" / f"stacks-{jax.process_index()}.txt"
        self._factor, self._floor, self._end = factor, seconds, end
        self._times: deque[float] = deque(maxlen=KEPT)
        self._begun, self._finished = 0, 0
        self._finished_at: float | None = None
        self._pauses = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        if self._factor > 0:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Watch no longer."""
        self._stop.set()

    def begun(self, step: int) -> None:
        """The host has handed a step to the device."""
        self._begun = step

    def finished(self, step: int) -> None:
        """The device has finished all steps up to this one."""
        now = clock.now()
        if self._finished_at is not None and step > self._finished:
            self._times.append((now - self._finished_at) / (step - self._finished))
        self._finished, self._finished_at = step, now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out a block that is no step: an evaluation, a checkpoint."""
        self._pauses += 1
        try:
            yield
        finally:
            self._finished_at = clock.now()  # before it is watched again
            self._pauses -= 1

    def limit(self) -> float | None:
        """Seconds that the steps begun so far may take; None before enough steps have been timed."""
        if len(self._times) < NEEDED:
            return None
        open_steps = max(1, self._begun - self._finished)
        return max(self._floor, self._factor * statistics.median(self._times) * open_steps)

    def _watch(self) -> None:
        while not self._stop.wait(min(POLL_SECONDS, self._floor / 4)):
            if self._pauses:
                continue
            limit, since = self.limit(), self._finished_at
            if limit is None or since is None:
                continue
            waited = clock.now() - since
            if waited > limit or (waited > self._floor / 2 and self._another_gave_up()):
                self._give_up(waited)
                return

    def _another_gave_up(self) -> bool:
        """Whether a process asks where this one is: its limit is lower if it has begun fewer steps."""
        if jax.process_count() == 1:
            return False
        with contextlib.suppress(Exception):  # a coordinator that has gone is not what is asked for here
            return bool(processes.look(_TOPIC))
        return False

    def _give_up(self, waited: float) -> None:
        """Dump the stacks of this process, name those that are behind, end."""
        begin_to_end(2 * REPORT_SECONDS)
        late = f"step {self._finished + 1} has not ended after {waited:.0f} s"
        after = "the same command goes on from the last checkpoint"
        error = TrainingFailed(f"{late}, and the coordinator does not answer; {after}")
        # Whatever happens, such as a coordinator that has ended: this process must end too.
        with contextlib.suppress(Exception):
            with clock.unless_done_within(REPORT_SECONDS, partial(self._end, error)):
                stacks, others = self._dump_stacks(), self._who_is_behind()
                if jax.process_count() > 1 and processes.is_first():
                    time.sleep(MEETING_SECONDS)  # the others still need the coordinator, which lives here
            error = TrainingFailed(f"{late}{others}; {stacks}; {after}")
        self._end(error)

    def _dump_stacks(self) -> str:
        """Where the stacks are, in words."""
        writing = threading.Thread(target=self._write_stacks, daemon=True)
        writing.start()
        writing.join(WRITE_SECONDS)
        with contextlib.suppress(OSError, ValueError):  # no real file, as under a notebook
            faulthandler.dump_traceback(sys.stderr)
        if writing.is_alive():
            return f"no stacks could be written to {self._path.parent}, look at the disk"
        return f"all stacks are in {self._path.parent}"

    def _write_stacks(self) -> None:
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(exist_ok=True)
            with self._path.open("w") as file:
                faulthandler.dump_traceback(file)

    def _who_is_behind(self) -> str:
        if jax.process_count() == 1:
            return ""
        processes.put(_TOPIC, str(self._begun))
        # The median of the others may differ a little from ours.
        deadline = clock.now() + MEETING_SECONDS
        standing: dict[int, str] = {}
        while clock.now() < deadline and len(standing) < jax.process_count():
            time.sleep(0.2)
            standing = processes.look(_TOPIC)
        return behind({number: int(step) for number, step in standing.items()}, jax.process_count())


def behind(standing: dict[int, int], count: int) -> str:
    """Which processes have not begun the newest step, in words; `standing` is the step that each one has begun."""
    newest = max(standing.values())
    late = [
        f"process {number} is at step {step}" for number, step in sorted(standing.items()) if step < newest
    ]
    late += [f"process {number} gives no sign" for number in range(count) if number not in standing]
    return f": step {newest} has been begun, {', '.join(late[:8])}" if late else ", which all have begun"
