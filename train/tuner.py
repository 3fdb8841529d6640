"""Where the config says `auto`: what is measured when a run begins, and what is chosen by it.

Shapes: E experts of a layer, S of them copied.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.cost import shadows_that_pay
from moejax.delivery import levels_of
from moejax.mesh import DATA, EXPERT_AXES, TENSOR, TOKEN_AXES
from moejax.moe import DEMAND_DECAY, MoE
from moejax.wire import row_bytes
from train import processes
from train.config import TrainConfig
from train.layers import moe_layers_of
from train.model import DTYPES, ModelSpec, Tuning, product_precision
from train.rates import describe, measure_rates

log = logging.getLogger("moejax")

MOST_SHADOWS = 8
"""Largest S: each copy takes the memory of an expert and of its gradient on every device."""
MARGIN = 0.05
"""Another S must save this share of what a step's MoE layers are estimated to take, or it is not worth compiling."""


class Tuner:
    """Measures what `model.moe.exchange = auto` and `model.moe.shadow = auto` go by; without either, nothing.

    All processes must make one and ask it the same: process 0 has measured, and decides.

    Fields:
      tuning: what is chosen at present.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh):
        moe = config.model.moe
        self._config, self._mesh = config, mesh
        self._axes = {axis: mesh.shape[axis] for axis in EXPERT_AXES if mesh.shape[axis] > 1}
        measured = self._axes if "auto" in (moe.exchange, moe.shadow) and moe_layers_of(config.model) else {}
        with product_precision(config):
            self._rates = {axis: measure_rates(mesh, axis, DTYPES[config.precision]) for axis in measured}
        links = {axis: rates.link for axis, rates in self._rates.items()}
        self.tuning = Tuning(links=links if moe.exchange == "auto" else None)

    def describe(self, spec: ModelSpec) -> list[str]:
        """What was measured, and the exchange chosen along each axis, in lines; under the ambient mesh."""
        lines = [
            f"measured along {axis}: {describe(rates.link)}; products at {rates.flops / 1e12:.2f} TFLOP/s"
            for axis, rates in self._rates.items()
        ]
        if self._config.model.moe.exchange == "auto" and self._rates:
            # The layers of a run may differ in their experts and routers.
            lines += dict.fromkeys(line for layer in spec.moe_of_layers() for line in self._exchanges(layer))
        return lines

    def _exchanges(self, layer: MoE) -> list[str]:
        router: Any = layer.router  # where experts choose, a token has room for `max_experts` of them
        parts = self._config.optimizer.accumulation_steps * self._devices(*TOKEN_AXES)
        levels = levels_of(
            self._axes,
            num_experts=layer.num_experts,
            num_tokens=self._config.data.batch_size * self._config.data.sequence_length // parts,
            top_k=getattr(router, "max_experts", router.top_k),
            width=layer.d_model,
            dtype=DTYPES[self._config.precision],
            **layer.delivery.arguments(),
        )
        lines = []
        for axis, seconds in levels.estimates.items():
            name = min(seconds, key=lambda name: seconds[name])
            times = ", ".join(f"{name} {1e3 * time:.3g} ms" for name, time in seconds.items())
            lines.append(f"exchange along {axis}: {name}, estimated for one chunk forward: {times}")
        return lines

    def choose_shadows(self, step: int, spec: ModelSpec, params: Any) -> bool:
        """Whether `tuning` has another S from here on, by the loads up to this step; says why in the log."""
        if self._config.model.moe.shadow != "auto" or not self._rates or step == 0:
            return False
        now, passes = self.tuning.shadow, self._config.optimizer.accumulation_steps
        # A sum that began with 0, over all data groups and passes of a step.
        scale = 1 / (1 - DEMAND_DECAY**step) / passes / self._devices(DATA)
        demands = jax.device_get(
            [layer.demand_E[...] for layer in spec.moe_of_layers(params) if layer.demand_E is not None]
        )
        loads = [load_E for demand_RE in demands for load_E in (scale * np.atleast_2d(demand_RE)).tolist()]
        there, back = row_bytes(
            self._config.model.d_model, DTYPES[self._config.precision], self._config.model.moe.wire
        )
        numbers = spec.numbers_of_expert() / self._devices(TENSOR)
        best, seconds = shadows_that_pay(
            loads,
            min(self._rates.values(), key=lambda rates: rates.link.bandwidth),
            devices=self._devices(*EXPERT_AXES),
            row_bytes=(there + back) / 2,
            expert_bytes=4 * numbers,
            row_flops=2 * numbers,
            at_most=min(MOST_SHADOWS, *spec.experts_of_layers),
            now=now,
            margin=MARGIN,
        )
        best = processes.from_first(best)
        estimates = ", ".join(f"{count}: {1e3 * passes * time:.3g}" for count, time in enumerate(seconds))
        change = f"{now} -> {best}" if best != now else f"still {now}"
        log.info(
            "shadows after step %d: %s; estimated ms of a step's MoE layers by their number: %s; "
            "a change must save %.0f %%",
            *(step, change, estimates, 100 * MARGIN),
        )
        self.tuning = replace(self.tuning, shadow=best)
        return best != now

    def _devices(self, *axes: str) -> int:
        return int(np.prod([self._mesh.shape[axis] for axis in axes]))
