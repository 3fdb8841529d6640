"""The contents of `checkpoints/`, for those who only look: no jax is needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RECORD = "record.json"


def checkpoint_steps(directory: Path) -> list[int]:
    """Steps of all complete checkpoints, oldest first; some may have been damaged since.

    A checkpoint is a folder named for its step; whatever else lies beside it is none of ours.
    """
    if not os.path.isdir(directory):
        return []
    named = {path: int(path.name) for path in directory.iterdir() if path.name.isdecimal()}
    return sorted(step for path, step in named.items() if path.name == str(step) and path.is_dir())


def read_record(directory: Path, step: int) -> dict[str, Any]:
    """The record of a checkpoint: step, data state, extra, and shapes and dtypes of the leaves."""
    return json.loads((directory / str(step) / RECORD).read_text(encoding="utf-8"))
