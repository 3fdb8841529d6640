"""Warnings when the gradient's norm jumps far above what it was."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 100
"""Steps over which the median is taken."""
NEEDED = 20
"""Steps before which nothing is unusual."""


class SpikeWatch:
    """Looks at the gradient norm of each step; a process that goes on from a checkpoint begins with an empty window.

    Args:
      factor: how many times the median is a spike; 0: nothing is.
    """

    def __init__(self, factor: float):
        self._factor = factor
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def __call__(self, step: int, grad_norm: float) -> str | None:
        """The warning of one step, if there is one."""
        if not math.isfinite(grad_norm):
            return None  # is reported as what it is
        count = len(self._recent)
        typical = statistics.median(self._recent) if count >= NEEDED else math.inf
        self._recent.append(grad_norm)
        if self._factor == 0 or not grad_norm > self._factor * typical:
            return None
        return (
            f"step {step}: gradient norm {grad_norm:.3g}, {grad_norm / typical:.0f} times the median of the last "
            f"{count} steps; if the loss follows, lower optimizer.learning_rate or optimizer.clip_norm"
        )
