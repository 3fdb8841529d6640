"""The corpus that every machine has: the source text of the Python standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from train.data.documents import Document
from train.errors import ConfigError

# Tests (whose data is often broken on purpose), what others installed, and compiled files.
_FOLDERS_LEFT_OUT = frozenset(
    (
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "_vendor",
        "_bundled",
        "__pycache__",
        "lib-dynload",
    )
)
# Written when Python was built on a machine, and different on each.
_MACHINE_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-")


def read_stdlib(field: str) -> Iterator[Document]:
    """Every module in the order of relative paths; files that are no valid UTF-8 are left out.

    Raises:
      ConfigError: this Python came without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = 0
    for path in sorted(_modules(root), key=lambda file: file.relative_to(root).as_posix()):
        raw = path.read_bytes()
        try:
            raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        found += 1
        yield Document(field, str(path), raw)
    if not found:
        raise ConfigError(
            field, "unset", f"this Python has no standard library sources in {root}; name a corpus"
        )


def _modules(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in _FOLDERS_LEFT_OUT and not name.startswith(_MACHINE_PREFIXES)
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith(_MACHINE_PREFIXES):
                yield Path(folder, name)
