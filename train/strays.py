"""Files that other programs leave in any folder: they are no part of what we keep or read there."""

from __future__ import annotations

_LEFT_BY_SYSTEMS = frozenset(("thumbs.db", "desktop.ini", "icon\r", "lost+found", "__macosx"))


def is_stray(name: str) -> bool:
    """Whether a file or folder of this name is hidden (`.DS_Store`, `.nfs…`, `._x`) or a system's own."""
    return name.startswith(".") or name.lower() in _LEFT_BY_SYSTEMS
