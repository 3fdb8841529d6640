"""Paths as a user writes them on a command line or in a config."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from train.errors import ConfigError
from train.fields import shown


def expanded(field: str, text: str) -> Path:
    """The path with `~` or `~user` at its beginning replaced: a shell does not do that in `--field=~/x`.

    Raises:
      ConfigError: nobody knows that home, or the name is no UTF-8, which libraries in C++ take every name for.
    """
    path = os.path.expanduser(text)
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
        raise ConfigError(field, shown(whole), rule)
    return Path(path)
