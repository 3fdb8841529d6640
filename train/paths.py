"""Paths as a user writes them on a command line or in a config."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from train.errors import ConfigError
from train.fields import shown
from train.reading import reason


def with_home(text: str) -> str:
    """The path with `~` or `~user` at its beginning replaced; unchanged where nobody knows that home.

    An empty HOME is none: what is below it would be at the root of the disk.
    """
    is_own = text.partition("/")[0] == "~"
    return text if is_own and os.environ.get("HOME") == "" else os.path.expanduser(text)


def expanded(field: str, text: str) -> Path:
    """As `with_home`, for a path that will be written to: a shell does not replace `~` in `--field=~/x`.

    Raises:
      ConfigError: nobody knows that home, or the name is no UTF-8, which libraries in C++ take every name for.
    """
    path = with_home(text)
    if path.startswith("~"):
        home = text.partition("/")[0]
        rule = f"begins with {home}, but no home is known for it; write ./{home} for a folder of that name"
        raise ConfigError(field, shown(text), rule)
    whole = os.path.abspath(path)
    try:
        is_utf8 = os.fsencode(whole) == whole.encode("utf-8")
    except UnicodeEncodeError:
        is_utf8 = False
    if not is_utf8:
        encoding = sys.getfilesystemencoding()
        rule = f"must be UTF-8, but this process reads names as {encoding}; set LC_ALL=C.UTF-8 or choose another name"
        if encoding == "utf-8":
            rule = "must be UTF-8, but has other bytes; choose another name"
        raise ConfigError(field, shown(whole), rule)
    return Path(path)


def in_the_way(workdir: str | os.PathLike[str], path: str | os.PathLike[str], error: OSError) -> ConfigError:
    """The error for a path below a workdir that a run cannot write to."""
    cure = "move it away, or choose another workdir" if os.path.lexists(path) else "choose another workdir"
    return ConfigError("workdir", workdir, f"cannot hold a run: {path}: {reason(error)}; {cure}")
