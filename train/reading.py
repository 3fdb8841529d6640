"""Reading what others have written: whatever a reader raises over a file ends in one line with field and file."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from train.errors import ConfigError, RunError, one_line

_LONGEST = 200  # characters of a library's own words
_KINDS = {
    stat.S_IFDIR: "Is a directory",
    stat.S_IFIFO: "a named pipe, not a file",
    stat.S_IFCHR: "a device, not a file",
    stat.S_IFBLK: "a device, not a file",
    stat.S_IFSOCK: "a socket, not a file",
}


@contextlib.contextmanager
def reading(field: str, name: object, kind: str) -> Iterator[None]:
    """Turn every exception of the block into a ConfigError: a third-party reader may raise anything over bad bytes.

    Errors that already have their line, a full memory and Ctrl-C pass.

    Args:
      field: the config field or argument that named the file.
      name: the file, with the place in it where there is one.
      kind: what it must be, such as `valid YAML`.

    Raises:
      ConfigError: `cannot be read: …` where the system refused, `is not <kind>: …` otherwise.
    """
    try:
        yield
    except (RunError, MemoryError):
        raise
    except OSError as error:
        raise ConfigError(field, name, f"cannot be read: {reason(error)}") from error
    except Exception as error:
        raise ConfigError(field, name, f"is not {kind}: {reason(error)}") from error
    except BaseException as error:
        # A panic in Rust arrives as an exception that `except Exception` lets through.
        if type(error).__name__ != "PanicException":
            raise
        raise ConfigError(field, name, f"is not {kind}: {reason(error)}") from error


def regular(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path, if it is that of a file: to open a pipe or a device may wait for ever.

    Raises:
      OSError: it is of another kind, or cannot be looked at.
    """
    mode = stat.S_IFMT(os.stat(path).st_mode)
    if mode != stat.S_IFREG:
        raise OSError(0, _KINDS.get(mode, "not a file"))
    return path


@contextlib.contextmanager
def without_panics() -> Iterator[None]:
    """Keep a library in Rust from writing its panics to standard error: they arrive as exceptions too.

    Rust writes to the descriptor itself. Meanwhile nothing else reaches it, so the block should be short.
    """
    try:
        kept = os.dup(2)
    except OSError:  # there is no standard error
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def beside(path: str | os.PathLike[str], *patterns: str) -> list[str]:
    """The files in the folder of one that was not found; none where nobody can look into it."""
    with contextlib.suppress(OSError, ValueError):
        folder = Path(path).parent
        return [str(found) for pattern in patterns for found in folder.glob(pattern) if os.path.isfile(found)]
    return []


def reason(error: BaseException) -> str:
    """The text of an exception, in one line of bounded length."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, UnicodeDecodeError):
        return f"invalid UTF-8 at byte {error.start}"
    if isinstance(error, KeyError):
        return one_line(f"it has no {error}", _LONGEST)
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return one_line(text.strip().partition("\n")[0], _LONGEST) if text.strip() else type(error).__name__
