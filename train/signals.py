"""Signals that ask a run to stop: honoured after the step, with a checkpoint."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger("moejax")

_SHOW_CURSOR = "\x1b[?25h"


class Stop:
    """A signal that asked the run to stop: `number`, 0 for none yet."""

    number = 0

    def after(self, step: int) -> bool:
        """Whether the run is to stop after this step; asked once after each."""
        return self.number > 0


class StopTogether(Stop):
    """The same for several processes, of which any may be signalled: all stop after the same step.

    jax's coordination service passes SIGTERM on and chooses a step that no process has passed yet.
    """

    def after(self, step: int) -> bool:
        """Whether the run is to stop after this step, in all processes alike."""
        if multihost_utils.reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        return self.number > 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a request that the loop honours after the step; a second one acts at once."""
    if jax.process_count() > 1:
        # jax has taken SIGTERM when the processes were joined; a terminal's SIGINT is left to `moejax launch`.
        yield StopTogether()
        return
    stop = Stop()

    def request(number: int, _: Any) -> None:
        if stop.number:
            # Not by an exception: jax swallows one that strikes in a callback of its own, while it compiles.
            sys.stderr.write(
                f"{_SHOW_CURSOR if sys.stderr.isatty() else ''}error: stopped at once by signal {number}\n"
            )
            sys.stderr.flush()
            os._exit(128 + number)
        stop.number = number
        log.warning(
            "signal %d: a checkpoint is written after this step; the same again stops at once", number
        )

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    previous: dict[int, Any] = {
        number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
