"""A run as its files tell it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train import metrics
from train.config import TrainConfig
from train.config_io import load_config, naming_versions, version_in
from train.errors import ConfigError
from train.fields import shown
from train.reading import reading

# Lists in lists that the numbers of the layers are drawn from; all that is no layer's is a number.
_DEPTHS = {"load": 2, "max_vio": 1, "router_entropy": 1, "logit_norm": 1}


@dataclass(frozen=True)
class Run:
    """Config and metrics of a run.

    Fields:
      name: of its directory.
      directory: where it is.
      config: as it was resolved.
      steps: lines of logged training steps.
      evaluations: lines of evaluations.
    """

    name: str
    directory: Path
    config: TrainConfig
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    def series(self, field: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps at which a field of the training steps or of the evaluations was logged, and its values."""
        steps, values = self._lines(field)
        return steps, np.array(values, float)

    def _lines(self, field: str) -> tuple[np.ndarray, list[Any]]:
        lines = [line for line in (*self.steps, *self.evaluations) if field in line]
        return np.array([line["step"] for line in lines]), [line[field] for line in lines]

    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and losses of the evaluations."""
        pairs = [(line["step"], line["eval/loss"]) for line in self.evaluations]
        return np.array([step for step, _ in pairs]), np.array([loss for _, loss in pairs], float)

    def load(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Steps [N], and of each MoE layer its experts' load [N, E] as a multiple of the even share."""
        steps, lines = self._lines(metrics.LAYERS + "load")
        loads = [np.array(load_NE, float) for load_NE in zip(*lines, strict=True)]
        return steps, [load_NE / np.maximum(load_NE.mean(axis=1, keepdims=True), 1e-9) for load_NE in loads]


def read_run(directory: str | os.PathLike[str]) -> Run:
    """Read a run's files.

    Raises:
      ConfigError: no training step has been logged yet.
    """
    path = Path(directory)
    config = path / "config.yaml"
    with reading("RUN", config, "a config"):
        writer = version_in(config)
    with naming_versions(writer, path / metrics.FILE_NAME):
        lines = list(metrics.read(path / metrics.FILE_NAME))
        with reading("RUN", path / metrics.FILE_NAME, "a file of metrics"):  # lists may be nested deeply
            _refuse_other_shapes(path / metrics.FILE_NAME, lines)
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise ConfigError("RUN", directory, "has logged no step yet")
    evaluations = [line for line in lines if "eval/loss" in line]
    return Run(path.resolve().name, path, load_config(config), steps, evaluations)


def _refuse_other_shapes(path: Path, lines: list[dict[str, Any]]) -> None:
    """A ConfigError where a line has lists for a number, or lists of other lengths than the lines before it."""
    shapes: dict[str, Any] = {}
    for line in lines:
        for name, value in line.items():
            of_layers = metrics.LAYERS in name
            depth = _DEPTHS.get(name.partition(metrics.LAYERS)[2]) if of_layers else 0
            if depth is None:  # is not drawn
                continue
            shape = _shape(value)
            if _depth(shape) != depth or shapes.setdefault(name, shape) != shape:
                kind = (
                    "a number"
                    if depth == 0
                    else f"a list of {'numbers' if depth == 1 else 'lists'} per layer"
                )
                rule = f"is not a record of metrics: {shown(name)} at step {line['step']} must be {kind}"
                raise ConfigError("RUN", path, rule + (", as on the lines before it" if depth else ""))


def _shape(value: Any) -> Any:
    """Nested lists as nested tuples, a number as None."""
    return tuple(map(_shape, value)) if isinstance(value, list) else None


def _depth(shape: Any) -> int | None:
    """How deeply a shape is nested; None where a list is empty, or its entries are not alike."""
    if shape is None:
        return 0
    depths = set(map(_depth, shape))
    depth = depths.pop() if len(depths) == 1 else None
    return None if depth is None else depth + 1
