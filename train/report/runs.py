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
from train.reading import reading


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
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise ConfigError("RUN", directory, "has logged no step yet")
    evaluations = [line for line in lines if "eval/loss" in line]
    return Run(path.resolve().name, path, load_config(config), steps, evaluations)
