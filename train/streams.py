"""Standard input, output and error as they may be handed to a process: closed, full, or of a narrow encoding."""

from __future__ import annotations

import contextlib
import os
import sys


def mend_streams() -> None:
    """Make all three streams usable; called before any file is opened.

    A file would get the number of a closed stream, and what C++ writes to that stream would go into the file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(
                os.open(os.devnull, os.O_RDWR), True
            )  # it gets the lowest free number: this one
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(
                errors="backslashreplace"
            )  # file names have characters that a terminal may lack


def say(text: str) -> None:
    """Write a line to standard error, if anybody still reads it."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def drop_unread() -> None:
    """Forget what a stream cannot take any more: at its end the interpreter would fail with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
