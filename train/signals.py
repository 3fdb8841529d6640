"""Signals that ask a run to stop: honoured after the step or the batch of an evaluation, with a checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

log = logging.getLogger("moejax")

_SHOW_CURSOR = "\x1b[?25h"
_places = itertools.count(1)  # of this process: those at which all processes of the run ask whether to stop

T = TypeVar("T")


class AskedToStop(Exception):
    """A signal came while something was done that can be done again."""


class Stop:
    """A signal that asked the run to stop: `number`, 0 for none yet."""

    number = 0

    def here(self) -> bool:
        """Whether the run is to stop here; all processes must ask at the same places."""
        return self.number > 0

    def checked(self, items: Iterable[T]) -> Iterator[T]:
        """The items one by one.

        Raises:
          AskedToStop: before the next item, when the run is to stop.
        """
        for item in items:
            if self.here():
                raise AskedToStop
            yield item


class StopTogether(Stop):
    """The same for several processes; any of them may be signalled: all stop at the same place.

    jax's coordination service passes SIGTERM on and chooses a place that no process has passed yet.
    """

    def here(self) -> bool:
        """Whether the run is to stop here, in all processes alike."""
        if not self.number and multihost_utils.reached_preemption_sync_point(next(_places)):
            self.number = signal.SIGTERM
        return self.number > 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a request that the loop honours at its next `Stop.here`; a second one acts at once.

    SIGUSR1, which Slurm sends where it is told to (`--signal=USR1@120`), is as good as SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield StopTogether() if jax.process_count() > 1 else Stop()  # only the main thread may handle signals
        return
    before = signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        # jax has taken SIGTERM when the processes were joined; a terminal's SIGINT is left to `moejax launch`.
        with contextlib.nullcontext(StopTogether()) if jax.process_count() > 1 else _stop_alone() as stop:
            yield stop
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def _stop_alone() -> Iterator[Stop]:
    stop = Stop()

    def request(number: int, _: Any) -> None:
        if stop.number:
            # Not by an exception: jax swallows one that strikes in a callback of its own, while it compiles.
            # Not by `sys.stderr` either: the signal may have come while a line is written to it.
            with contextlib.suppress(OSError):
                cursor = _SHOW_CURSOR if os.isatty(2) else ""
                os.write(2, f"{cursor}error: stopped at once by signal {number}\n".encode())
            os._exit(128 + number)
        stop.number = number
        log.warning(
            "signal %d: a checkpoint is written after this step; the same again stops at once", number
        )

    previous: dict[int, Any] = {
        number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
