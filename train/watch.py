"""Warnings with advice when experts die, routing collapses, or too much is dropped.

Shapes: M MoE layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from train.metrics import DROP_CAUSES

# Entropy of the load over its largest value: at 0.5, 8 experts share the work as if they were fewer than 3, 64 as if
# they were 8.
COLLAPSED = 0.5
_CURE_OF_DROPS = {
    "dropped_by_router": "raise model.moe.routing.capacity_factor, or choose a router without a capacity",
}
_MORE_ROOM = "raise model.moe.capacity_factor, or let model.moe.overflow be rounds"


class ExpertWatch:
    """Looks at each logged step; says a thing when it begins, and again only after it has ended.

    Args:
      drop_limit: share of dropped choices that is still accepted.
      dead_after: steps without a token after which an expert counts as dead.
    """

    def __init__(self, drop_limit: float, dead_after: int):
        self._drop_limit, self._dead_after = drop_limit, dead_after
        self._dead: set[tuple[int, int]] = set()
        self._going_on: set[str] = set()

    def __call__(self, step: int, metrics: Mapping[str, float], layers: Mapping[str, Any]) -> Iterator[str]:
        """The warnings of one step, from its scalars and the numbers of each MoE layer."""
        if not layers:
            return
        dead = {
            (layer, int(expert))
            for layer, dead_E in enumerate(layers["dead"])
            for expert in np.flatnonzero(dead_E)
        }
        if new := sorted(dead - self._dead):
            yield (
                f"step {step}: no token for {self._dead_after} steps: {_listed(new)}; raise "
                "model.moe.routing.balance_weight, or balance without a loss: model.moe.router sigmoid"
            )
        self._dead = dead

        collapsed = np.flatnonzero(layers["load_entropy"] < COLLAPSED)
        if self._begins("collapse", len(collapsed) > 0):
            layer = int(collapsed[0])
            share = layers["load"][layer].max() / max(layers["load"][layer].sum(), 1)
            yield (
                f"step {step}: routing collapses: in MoE layer {layer} one expert has {share:.0%} of the "
                "choices; raise model.moe.routing.balance_weight (without a loss, as with sigmoid: lower "
                "model.moe.routing.bias_rate), lower optimizer.learning_rate, or warm up longer"
            )
        dropped = metrics["moe/dropped_fraction"]
        if self._begins("drops", dropped > self._drop_limit):
            worst = max(DROP_CAUSES, key=lambda cause: metrics.get(f"moe/{cause}", 0.0))
            yield (
                f"step {step}: {dropped:.1%} of the choices are dropped, more than log.drop_limit, most of them "
                f"{DROP_CAUSES[worst]}; {_CURE_OF_DROPS.get(worst, _MORE_ROOM)}"
            )
        if self._begins("invalid", metrics["moe/invalid"] > 0):
            count = int(metrics["moe/invalid"])
            yield f"step {step}: the router gave {count} expert ids that do not exist; they count as none"

    def _begins(self, name: str, is_so: bool) -> bool:
        began = is_so and name not in self._going_on
        (self._going_on.add if is_so else self._going_on.discard)(name)
        return began


def _listed(experts: list[tuple[int, int]], limit: int = 6) -> str:
    """MoE layer and expert of the first few, and how many more there are."""
    parts = [f"expert {expert} of MoE layer {layer}" for layer, expert in experts[:limit]]
    more = len(experts) - limit
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")
