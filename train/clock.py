"""Time in which this process could work: what passes while it is suspended does not count.

A process is suspended by Ctrl-Z, `scontrol suspend` or `docker pause`. The system's clocks run on meanwhile; they stop
only while the whole machine sleeps. Whether a gap was that, or memory that was swapped out, or a call that let no other
thread run, cannot be told from within: the log has a line about it.
"""

from __future__ import annotations

import functools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TICK_SECONDS = 1.0
"""How often a thread looks at the clock."""
ASLEEP_SECONDS = 5.0
"""A longer gap between two looks is taken for a suspension: a thread hardly ever waits for so long."""
QUIET_SECONDS = 60.0
"""The least time between two lines about gaps."""

log = logging.getLogger("moejax")


class Clock:
    """Seconds; a gap between two looks that is longer than `ASLEEP_SECONDS` counts as one tick.

    Args:
      monotonic: the system's clock.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic):
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._seen, self._asleep = monotonic(), 0.0
        # Seconds left out that no line has told of, and when the last line did.
        self._untold, self._told_at = 0.0, -math.inf

    def now(self) -> float:
        """Seconds since some moment, without those in which nobody could look."""
        untold = 0.0
        with self._lock:
            seen = self._monotonic()
            gap = seen - self._seen
            self._seen = seen
            if gap > ASLEEP_SECONDS:
                self._asleep += gap - TICK_SECONDS
                self._untold += gap - TICK_SECONDS
                if seen - self._told_at >= QUIET_SECONDS:
                    untold, self._untold, self._told_at = self._untold, 0.0, seen
            awake = seen - self._asleep
        if untold:  # beside the lock: who writes the line may ask for the time
            log.info(
                "%.0f s do not count as work: the process was suspended, or nothing in it could run",
                untold,
            )
        return awake

    def keep_looking(self) -> None:
        """Look at every tick, for ever."""
        while True:
            time.sleep(TICK_SECONDS)
            self.now()


_making = threading.Lock()


def _of_this_process() -> Clock:
    with _making:  # threads that ask for the first time at once get the same one
        return _make()


@functools.cache
def _make() -> Clock:
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
