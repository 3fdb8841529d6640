"""The end of a process that must wait for nothing: a disk, a thread or another process may never answer."""

from __future__ import annotations

import os
import threading
import time

from train.errors import RunError
from train.streams import drop_unread, say

ENDING_SECONDS = 10
"""How long a process may close its files after it has found that its disk does not answer."""
CLOSE_SECONDS = 600
"""How long it may take otherwise: a slow disk may still have much to write."""

_begun = threading.Event()


def begin_to_end() -> None:
    """This process has found why it ends, and is about to: what becomes of others is no reason any more."""
    _begun.set()


def is_ending() -> bool:
    """Whether `begin_to_end` has been called."""
    return _begun.is_set()


def leave(error: RunError) -> None:
    """End the process with the code of an error that has been said, files closed or not."""
    drop_unread()
    os._exit(error.exit_code)


def end_at_once(error: RunError) -> None:
    """The same, and say the error."""
    say(f"error: {' '.join(str(error).split())}")
    leave(error)


def end_soon(error: RunError) -> None:
    """End the process with this error if it has not ended by itself within `ENDING_SECONDS`."""

    def wait() -> None:
        time.sleep(ENDING_SECONDS)
        end_at_once(error)

    begin_to_end()
    threading.Thread(target=wait, name="ending", daemon=True).start()
