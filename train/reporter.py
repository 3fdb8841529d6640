"""From the metrics on the device to the run's reports, without making the device wait."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.errors import NotFinite
from train.finite import FiniteCheck
from train.metrics import LAYERS, of_existing
from train.model import ModelSpec
from train.monitor import Bystander, Monitor
from train.spikes import SpikeWatch
from train.step import Metrics
from train.watchdog import Watchdog

log = logging.getLogger("moejax")

# Steps whose metrics may wait on the device: few enough that a NaN is named soon.
MAX_AHEAD = 16
# Steps that the device may have before it: enough to keep it busy, few enough that a signal need not wait for many.
# XLA's CPU client holds 32 computations of a device at once; a thread that launches one more waits, and on several
# devices the slowest may need that very thread: a deadlock.
QUEUED = 3


class Reporter:
    """Fetches metrics from the device outside the step, one step late, so that the device never waits for the host.

    Every step's metrics are looked at, so a NaN is named with its step, whatever `log.every` is, at most MAX_AHEAD
    steps late; the host is never more than QUEUED steps ahead of the device.

    Args:
      describe_checkpoint: says which checkpoint a failed run is left with.
      watchdog: is told which steps have begun and which are done.
    """

    def __init__(
        self,
        monitor: Monitor | Bystander,
        spec: ModelSpec,
        mesh: Mesh,
        describe_checkpoint: Callable[[], str],
        watchdog: Watchdog | None = None,
    ):
        self._watchdog = watchdog
        self._spikes = SpikeWatch(spec.config.log.spike_factor)
        self._skipped = 0
        self._monitor = monitor
        self._experts_of_layers = spec.experts_of_layers
        self._describe_checkpoint = describe_checkpoint
        self._check_finite = FiniteCheck(spec)
        self._finite_parts = jax.jit(self._check_finite, out_shardings=NamedSharding(mesh, P()))
        self._device = mesh.local_mesh.devices.flat[0]
        self._pending: list[tuple[int, Metrics, bool]] = []

    def add(self, step: int, metrics: Metrics, *, logged: bool) -> None:
        """Take a step's metrics, still on the device; first report an earlier step that was to be logged."""
        if any(was_logged for *_, was_logged in self._pending) or len(self._pending) >= MAX_AHEAD:
            self.flush()
        self._pending.append((step, metrics, logged))
        if len(self._pending) > QUEUED:
            jax.block_until_ready(self._pending[-1 - QUEUED][1])
            if self._watchdog:
                self._watchdog.finished(step - QUEUED)
        if self._watchdog:
            self._watchdog.begun(step)

    def flush(self) -> None:
        """Fetch, check and report all steps so far.

        Raises:
          NotFinite: a step was not finite; names the first such step and where it began.
        """
        fetched = jax.device_get([metrics for _, metrics, _ in self._pending])
        for (step, _, logged), metrics in zip(self._pending, fetched, strict=True):
            self._refuse_nan(step, metrics)
            if warning := self._spikes(step, float(metrics["grad_norm"])):
                log.warning("%s", warning)
            if logged:
                self._monitor.train(step, self._scalars(metrics), self._layers(metrics))
        if self._watchdog and self._pending:
            self._watchdog.finished(self._pending[-1][0])
        self._pending.clear()

    def refuse_broken(self, step: int, params: Any) -> None:
        """Before a checkpoint: one with NaN or Inf must never take the place of a good one.

        Raises:
          NotFinite: names the parameter and its layer.
        """
        broken = self._check_finite.first(jax.device_get(self._finite_parts(params)))
        if broken is not None:
            raise NotFinite(
                step,
                f"step {step}: the update made parameters NaN or Inf, {broken} first; "
                f"lower optimizer.learning_rate; {self._describe_checkpoint()}",
            )

    def _refuse_nan(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        bad_layers = np.flatnonzero(~metrics["finite_layers"])
        bad_gradient = self._check_finite.origin_of_gradient(metrics["finite_grads"])
        sums = np.isfinite([metrics["loss"], metrics["aux_loss"], metrics["grad_norm"]]).all()
        if sums and not len(bad_layers) and bad_gradient is None:
            return
        if len(bad_layers):
            where = f"layer {bad_layers[0]} is the first whose output is not finite"
        elif not np.isfinite(metrics["loss"]):
            where = "all layers are finite, the output projection is not"
        elif bad_gradient is not None:
            where = f"the gradient of {bad_gradient} is not finite"
        else:
            where = f"grad_norm {float(metrics['grad_norm'])}, aux_loss {float(metrics['aux_loss'])}"
        if metrics.get("skipped"):
            self._skipped += 1
            log.warning(
                "step %d: loss %s: %s; the batch is skipped, the %d. one since the run began or went on",
                *(step, float(metrics["loss"]), where, self._skipped),
            )
            return
        raise NotFinite(
            step, f"step {step}: loss {float(metrics['loss'])}: {where}; {self._describe_checkpoint()}"
        )

    def _scalars(self, metrics: dict[str, np.ndarray]) -> dict[str, float]:
        line = {name: value.item() for name, value in metrics.items() if np.ndim(value) == 0}
        # A measurement like the times: after a restart the process has another peak. None on CPU.
        memory = self._device.memory_stats()
        if memory and "peak_bytes_in_use" in memory:
            line["memory_bytes"] = memory["peak_bytes_in_use"]
        return line

    def _layers(self, metrics: dict[str, np.ndarray]) -> dict[str, Any]:
        """The numbers of each MoE layer, by their short names."""
        layers: dict[str, Any] = {
            name.removeprefix(LAYERS): value for name, value in metrics.items() if name.startswith(LAYERS)
        }
        of_each_expert = {name: layers[name] for name in ("load", "dead") if name in layers}
        return layers | {name: of_existing(v, self._experts_of_layers) for name, v in of_each_expert.items()}
