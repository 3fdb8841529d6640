"""Signals that ask a run to stop: honoured after the step, with a checkpoint."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger("moejax")


class Stop:
    """Number of the signal that asked the run to stop, 0 for none."""

    number = 0


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn SIGINT and SIGTERM into a request that the loop honours after the step; a second one acts at once."""
    stop = Stop()

    def request(number: int, _: Any) -> None:
        stop.number = number
        signal.signal(number, previous[number])
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
