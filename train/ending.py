"""The end of a process that must wait for nothing: a disk, a thread or another process may never answer."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from train.clock import now
from train.errors import FailedTogether, RunError, TrainingFailed
from train.streams import drop_unread, say

ENDING_SECONDS = 10
"""How long a process may close its files after it has found that its disk does not answer."""
CLOSE_SECONDS = 600
"""How long it may take otherwise: a slow disk may still have much to write."""
NOTE_SECONDS = 2
"""How long the log may take to get the error: it may be on a disk that does not answer."""


class Others(Protocol):
    """The other processes of the run."""

    def tell(self, error: RunError) -> None:
        """Tell them the error by which this process leaves them."""

    def part(self) -> None:
        """End in order, which all do together."""


_ends_by = -math.inf  # until then this process is about to end
_others: list[Others] = []
_notes: list[Callable[[BaseException], None]] = []


def begin_to_end(seconds: float) -> None:
    """This process has found why it ends, and will have ended so soon: what becomes of others is no reason any more."""
    global _ends_by
    _ends_by = now() + seconds


def is_ending() -> bool:
    """Whether `begin_to_end` has been called, and the process still has time."""
    return now() < _ends_by


@contextmanager
def closing_after_errors() -> Iterator[None]:
    """An error of this process alone that leaves the block is why it ends, however long it then closes its files."""
    try:
        yield
    except FailedTogether:
        raise
    except (OSError, MemoryError, TrainingFailed):
        begin_to_end(CLOSE_SECONDS)
        raise


def note_by(note: Callable[[BaseException], None]) -> None:
    """Let the log of the run have the error by which a thread ends the process."""
    _notes[:] = [note]


def join_others(others: Others) -> None:
    """From now on this process does not end without them."""
    _others[:] = [others]


def part() -> None:
    """End in order, together with the others of the run if there are any."""
    for others in _others:
        others.part()


def leave(error: RunError) -> None:
    """End the process with the code of an error that has been said, files closed or not."""
    for others in _others:
        others.tell(error)
    drop_unread()
    os._exit(error.exit_code)


def end_at_once(error: RunError) -> None:
    """The same, and say the error."""
    say(f"error: {' '.join(str(error).split())}")
    for note in _notes:
        writing = threading.Thread(target=note, args=(error,), daemon=True)
        writing.start()
        writing.join(NOTE_SECONDS)
    leave(error)


def end_soon(error: RunError) -> None:
    """End the process with this error if it has not ended by itself within `ENDING_SECONDS`."""

    def wait() -> None:
        time.sleep(ENDING_SECONDS)
        end_at_once(error)

    begin_to_end(2 * ENDING_SECONDS)
    threading.Thread(target=wait, name="ending", daemon=True).start()
