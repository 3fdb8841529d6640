"""Versions of moejax and what it is built on."""

from __future__ import annotations

import importlib.metadata


def version_of(package: str) -> str:
    """The installed version; `not installed` where the sources are used as they are."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
