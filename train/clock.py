"""Time in which this process could work: what passes while it is suspended does not count.

A process is suspended by Ctrl-Z, `scontrol suspend` or `docker pause`. The system's clocks run on meanwhile; they stand
still only while the whole machine sleeps.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TICK_SECONDS = 1.0
"""How often a thread looks at the clock."""
ASLEEP_SECONDS = 5.0
"""A longer gap between two looks means that the process did not run: a thread never waits for so long."""


class Clock:
    """Seconds, of which a gap longer than `ASLEEP_SECONDS` between two looks counts as one tick.

    Args:
      monotonic: the system's clock.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic):
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._seen, self._asleep = monotonic(), 0.0

    def now(self) -> float:
        """Seconds since some moment, without those in which nobody could look."""
        with self._lock:
            seen = self._monotonic()
            gap = seen - self._seen
            if gap > ASLEEP_SECONDS:
                self._asleep += gap - TICK_SECONDS
            self._seen = seen
            return seen - self._asleep

    def keep_looking(self) -> None:
        """Look at every tick, for ever."""
        while True:
            time.sleep(TICK_SECONDS)
            self.now()


@functools.cache
def _of_this_process() -> Clock:
    clock = Clock()
    threading.Thread(target=clock.keep_looking, name="clock", daemon=True).start()
    return clock


def now() -> float:
    """Seconds of this process since some moment, for differences only."""
    return _of_this_process().now()


@contextmanager
def unless_done_within(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """A block that takes so long calls `act` once, in a thread of its own; never after the block has ended."""
    done, ending = threading.Event(), threading.Lock()

    def wait() -> None:
        deadline = now() + seconds
        while (left := deadline - now()) > 0:
            if done.wait(min(left, TICK_SECONDS)):
                return
        with ending:
            if not done.is_set():
                act()

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        with ending:
            done.set()
