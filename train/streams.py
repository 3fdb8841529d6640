"""Standard input, output and error as they may be handed to a process: closed, full, or of a narrow encoding."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast


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


@contextlib.contextmanager
def output_named() -> Iterator[None]:
    """What cannot be written to standard output in the block says so: a full disk there is not that of a run."""
    with contextlib.redirect_stdout(cast(TextIO, _Output(sys.stdout))):
        yield


class _Output:
    """Standard output whose errors name it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with _naming_it():
            return self._stream.write(text)

    def flush(self) -> None:
        with _naming_it():
            self._stream.flush()


@contextlib.contextmanager
def _naming_it() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:  # whoever read it has gone, which is no fault
        raise
    except OSError as error:
        raise OSError(f"standard output: {error.strerror or error}") from error


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
