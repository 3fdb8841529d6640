"""`metrics.jsonl`: one JSON object per logged step, exact to the last bit, each step once."""

from __future__ import annotations

import io
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.reading import reading, regular

log = logging.getLogger("moejax")

DROP_CAUSES = {
    "dropped_by_router": "by the router",
    "dropped_over_capacity": "over their experts' capacity",
    "dropped_at_sender": "at full buckets of the sender",
    "dropped_at_receiver": "at full buffers of the receiver",
}
"""Metrics below `moe/` that add up to `moe/dropped_fraction`, and what they say."""

EVALUATION = "eval/loss"
"""What the line of an evaluation has, and no other."""

FILE_NAME = "metrics.jsonl"

SHORTER = ".cut"
"""Ending of the file that takes its place when lines are cut from it."""

LAYERS = "moe/layers/"
"""What begins so has one entry per MoE layer, or per layer and expert."""

_STEPS = range(1 << 53)  # a float has each of them
_LARGEST = 1e300  # float32 ends at 3e38; close to the end of float64 nothing can be drawn


def of_existing(array_ME: np.ndarray, experts_of_layers: Sequence[int]) -> np.ndarray | list[np.ndarray]:
    """The rows of all layers without the experts that a layer does not have; an array where all have as many."""
    if all(experts == array_ME.shape[1] for experts in experts_of_layers):
        return array_ME
    return [row_E[:experts] for row_E, experts in zip(array_ME, experts_of_layers, strict=True)]


class Metrics:
    """Appends records to a file of JSON lines; the operating system has each line when `append` returns.

    Floats are written with `repr`, which reads back to the same bits. JSON has no NaN and no infinities: they
    are the strings "NaN", "Infinity" and "-Infinity", which `float()` understands; `read` gives floats again.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = _open(self.path)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; values are scalars of Python, numpy or jax, or arrays or lists of them."""
        line = json.dumps({name: _portable(value) for name, value in record.items()}, allow_nan=False)
        rest = memoryview(line.encode() + b"\n")
        while rest:
            rest = rest[self._file.write(rest) :]

    def truncate_after(self, step: int, *, evaluated: bool = True) -> None:
        """Keep the lines up to `step`, byte for byte, and drop later and half-written ones, in one rename.

        Args:
          evaluated: keep an evaluation after that very step too.
        """
        self._file.close()
        kept = []
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            record = _step_and_kind(line)
            if record is None and line.endswith(b"\n") and line.strip():
                log.warning("%s line %d is not a record of metrics and is left out", self.path, number)
            if record is not None and record[0] < step + (evaluated or not record[1]):
                kept.append(line)
        shorter = self.path.with_name(self.path.name + SHORTER)
        with shorter.open("wb") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        shorter.replace(self.path)
        self._file = _open(self.path)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open(path: Path) -> io.FileIO:
    """Unbuffered: what a full disk did not take must not be tried again when the file is closed."""
    return io.FileIO(path, "a")


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The records of a metrics file, with floats where it has "NaN", "Infinity" or "-Infinity".

    A training may be writing it, or have been killed over a line: an end without a line break is left out, as when
    the run goes on.

    Raises:
      ConfigError: the file cannot be read, or a whole line is no record; names the line.
    """
    with reading("RUN", path, "a file of metrics"), Path(regular(path)).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            if not line.strip():
                continue
            with reading("RUN", f"{path} line {number}", "a record of metrics"):
                record = json.loads(line)
                step = record.get("step") if isinstance(record, dict) else None
                if type(step) is not int or step not in _STEPS:
                    raise ValueError("it must be an object with a whole number as step")
                record = {name: _number(value) for name, value in record.items()}
            yield record


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(entry) for entry in value]
    if not isinstance(value, int | float | str):
        raise ValueError(f"a value is {type(value).__name__}, not a number")
    number = float(value)  # an integer beyond all floats raises
    if math.isfinite(number) and abs(number) > _LARGEST:
        raise ValueError(f"{number:g} is beyond what a training computes")
    return number if isinstance(value, str) else value


def _portable(value: Any) -> Any:
    number = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(number, list):
        return [_portable(entry) for entry in number]
    if isinstance(number, float) and not math.isfinite(number):
        return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
    return number


def _step_and_kind(line: bytes) -> tuple[int, bool] | None:
    """The step of a line and whether it is of an evaluation; None for half a line or a damaged one."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else {}
        step = record.get("step")
        return (step, EVALUATION in record) if type(step) is int else None
    except Exception:  # a damaged line may hold anything, such as lists nested too deeply
        return None
