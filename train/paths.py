"""Paths as a user writes them."""

from __future__ import annotations

import os
from pathlib import Path

from train.errors import ConfigError
from train.fields import shown


def expanded(field: str, text: str) -> Path:
    """The path with `~` or `~user` at its beginning replaced: a shell does not do that in `--field=~/x`.

    Raises:
      ConfigError: nobody knows that home.
    """
    path = os.path.expanduser(text)
    if path.startswith("~"):
        home = text.partition("/")[0]
        rule = f"begins with {home}, but no home is known for it; write ./{home} for a folder of that name"
        raise ConfigError(field, shown(text), rule)
    return Path(path)
