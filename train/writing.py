"""Writing small files that another process may be reading."""

from __future__ import annotations

from pathlib import Path


def scratch_of(name: str) -> str:
    """The name under which a file is written before it is renamed."""
    return name + ".new"


def replace_text(path: Path, text: str) -> None:
    """Write a file in one rename: who reads it meets the old one or the new one, whole."""
    scratch = path.with_name(scratch_of(path.name))
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)
