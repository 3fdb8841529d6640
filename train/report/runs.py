"""A run as its files tell it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from train import metrics
from train.config import TrainConfig
from train.config_io import load_config
from train.errors import ConfigError


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
        lines = [line for line in (*self.steps, *self.evaluations) if field in line]
        return np.array([line["step"] for line in lines]), np.array([line[field] for line in lines], float)

    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and losses of the evaluations."""
        pairs = [(line["step"], line["eval/loss"]) for line in self.evaluations]
        return np.array([step for step, _ in pairs]), np.array([loss for _, loss in pairs], float)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps [N], and load [N, M, E] as a multiple of the even share; of size 0 where nothing was logged."""
        steps, load_NME = self.series(metrics.LAYERS + "load")
        if load_NME.ndim != 3:
            return steps[:0], np.zeros((0, 0, 0))
        return steps, load_NME / np.maximum(load_NME.mean(axis=2, keepdims=True), 1e-9)


def read_run(directory: str | os.PathLike[str]) -> Run:
    """Read a run's files.

    Raises:
      ConfigError: no training step has been logged yet.
    """
    path = Path(directory)
    try:
        lines = list(metrics.read(path / "metrics.jsonl"))
    except OSError as error:
        raise ConfigError("RUN", directory, f"its metrics.jsonl cannot be read: {error.strerror}") from error
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise ConfigError("RUN", directory, "has logged no step yet")
    evaluations = [line for line in lines if "eval/loss" in line]
    config = load_config(path / "config.yaml")
    return Run(path.resolve().name, path, config, steps, evaluations)
