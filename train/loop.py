"""The training loop, top to bottom."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import moejax
from moejax.cost import peak_flops, train_flops_per_token
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.config_io import check_resumable, load_config, save_config
from train.data import Corpus, build_tokenizer, load_corpus, training_batches, validation_batches
from train.errors import Interrupted, TrainingFailed
from train.evaluate import device_batch, mean_loss
from train.lock import lock_run
from train.model import ModelSpec
from train.monitor import Monitor
from train.optimizer import make_optimizer, make_schedule
from train.step import Metrics, TrainState, make_eval_step, make_init, make_train_step, state_shardings
from train.validation import validate

log = logging.getLogger("moejax")


def train(config: TrainConfig, name: str) -> None:
    """Run `config` to its last step, from the newest sound checkpoint of its workdir if there is one.

    Args:
      name: of the config; part of the default workdir.

    Raises:
      ConfigError: bad input; nothing has been written.
      TrainingFailed: NaN, a full disk; the last good checkpoint is intact.
      Interrupted: a signal, after a checkpoint.
    """
    # ---- input: everything that can be refused is refused before the workdir exists ----
    validate(config, jax.device_count())
    workdir = Path(config.workdir or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}")
    if (workdir / "config.yaml").exists():
        check_resumable(load_config(workdir / "config.yaml"), config, workdir)
    tokenizer = build_tokenizer(config.data)
    corpus = load_corpus(config.data, tokenizer)
    batch_size, sequence_length = config.data.batch_size, config.data.sequence_length
    batches = training_batches(corpus, batch_size=batch_size, sequence_length=sequence_length, seed=config.seed)
    spec = ModelSpec.from_config(config, tokenizer.vocab_size)
    mesh = moejax.make_mesh(data=config.mesh.data, expert=config.mesh.expert)
    if config.precision == "f32":
        jax.config.update("jax_default_matmul_precision", "float32")  # no TF32 on GPUs

    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(lock_run(workdir))
        save_config(config, workdir / "config.yaml")
        tokenizer.save(workdir)
        stop = stack.enter_context(_stop_signals())

        # ---- model, optimizer, compiled steps ----
        schedule = make_schedule(config.optimizer, config.steps)
        optimizer = make_optimizer(config.optimizer, config.steps, spec)
        init = make_init(spec, optimizer, config.seed)
        shapes = jax.eval_shape(init)
        shardings = state_shardings(spec, shapes, mesh)
        train_step = jax.jit(
            make_train_step(spec, optimizer, schedule, mesh), donate_argnums=0, out_shardings=(shardings, None)
        )
        eval_step = jax.jit(make_eval_step(spec))

        # ---- restore, or begin ----
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", config.checkpoint))
        place = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)  # noqa: E731
        restored = checkpoints.restore(jax.tree.map(place, shapes, shardings))
        if restored is None:
            first, state = 0, jax.jit(init, out_shardings=shardings)()
        else:
            first, state, data_state, _ = restored
            batches.set_state(data_state)

        # ---- reports ----
        monitor = stack.enter_context(
            Monitor(
                workdir,
                config.log,
                total_steps=config.steps,
                start_step=first,
                tokens_per_step=batch_size * sequence_length,
            )
        )
        reporter = Reporter(monitor, spec, mesh)
        _introduce(spec, corpus, mesh, first)

        # ---- the loop ----
        for step in range(first + 1, config.steps + 1):
            state, metrics = train_step(state, device_batch(next(batches), mesh))
            last = step == config.steps
            reporter.add(step, metrics, logged=last or step == 1 or step % config.log.every == 0)

            evaluation: dict[str, float] = {}
            if last or _due(step, config.eval.every):
                reporter.flush()
                max_batches = None if last else config.eval.max_batches
                split = validation_batches(corpus, batch_size, sequence_length, max_batches)
                evaluation["eval/loss"] = mean_loss(eval_step, state.params, split, mesh)
                monitor.evaluation(step, evaluation["eval/loss"])
                reporter.restart_clock()

            if last or _due(step, config.checkpoint.every) or stop.number:
                reporter.flush()
                _refuse_broken(step, state)
                checkpoints.save(step, state, batches.get_state(), evaluation)
                reporter.restart_clock()

            if stop.number and not last:
                checkpoints.wait()
                raise Interrupted(stop.number, step)
        checkpoints.wait()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]).all()


def _refuse_broken(step: int, state: TrainState) -> None:
    """Never let a checkpoint with NaN or Inf take the place of a good one."""
    if not _all_finite(state.params):
        raise TrainingFailed(f"step {step}: the update made parameters NaN or Inf; lower optimizer.learning_rate")


class _Stop:
    """Number of the signal that asked the run to stop, 0 for none."""

    number = 0


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn SIGINT and SIGTERM into a request that the loop honours after the step; a second one acts at once."""
    stop = _Stop()

    def request(number: int, _: Any) -> None:
        stop.number = number
        signal.signal(number, previous[number])
        log.warning("signal %d: a checkpoint is written after this step; the same again stops at once", number)

    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread may handle signals
        return
    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _introduce(spec: ModelSpec, corpus: Corpus, mesh: Mesh, first: int) -> None:
    """Say in the log what is trained, on what, where."""
    total, active = spec.count_parameters()
    log.info("parameters: %s in all, %s active per token", f"{total:,}", f"{active:,}")
    log.info(
        "data: %s train and %s validation tokens in %s documents, sha256 %s",
        f"{corpus.train_tokens:,}",
        f"{corpus.validation_tokens:,}",
        f"{corpus.num_documents:,}",
        corpus.content_hash,
    )
    log.info("devices: %d x %s as %s", mesh.size, mesh.devices.flat[0].device_kind, dict(mesh.shape))
    if first:
        log.info("going on after step %d", first)


class Reporter:
    """Fetches metrics from the device outside the step, one step late, so that the device never waits for the host.

    Every step's metrics are looked at, so a NaN is found at its step, whatever `log.every` is.
    """

    def __init__(self, monitor: Monitor, spec: ModelSpec, mesh: Mesh):
        self._monitor = monitor
        self._config = config = spec.config
        self._parameter_names = [
            ".".join(str(getattr(key, "key", key)) for key in path)
            for path, _ in jax.tree_util.tree_leaves_with_path(spec.abstract_params(None))
        ]
        model = config.model
        _, active = spec.count_parameters()
        self._flops_per_step = (
            config.data.batch_size
            * config.data.sequence_length
            * train_flops_per_token(active, model.num_layers, model.d_model, config.data.sequence_length)
        )
        peak = peak_flops(mesh.devices.flat[0])
        self._peak_flops = None if peak is None else peak * mesh.size
        self._device = mesh.local_mesh.devices.flat[0]
        self._pending: list[tuple[int, Metrics, bool]] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """What came since the last flush is not the steps' time."""
        self._since = time.perf_counter()
        self._steps = 0

    def add(self, step: int, metrics: Metrics, *, logged: bool) -> None:
        """Take a step's metrics, still on the device; first report an earlier step that was to be logged."""
        if any(was_logged for *_, was_logged in self._pending):
            self.flush()
        self._pending.append((step, metrics, logged))

    def flush(self) -> None:
        """Fetch, check and report all steps so far.

        Raises:
          TrainingFailed: a step was not finite; names the first such step and where it began.
        """
        fetched = jax.device_get([metrics for _, metrics, _ in self._pending])
        self._steps += len(fetched)
        seconds = (time.perf_counter() - self._since) / max(self._steps, 1)
        for (step, _, logged), metrics in zip(self._pending, fetched, strict=True):
            self._refuse_nan(step, metrics)
            if logged:
                self._monitor.train(step, self._scalars(step, metrics, seconds))
                self.restart_clock()
        self._pending.clear()

    def _refuse_nan(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        bad_layers = np.flatnonzero(~metrics["finite_layers"])
        bad_grads = np.flatnonzero(~metrics["finite_grads"])
        if np.isfinite(metrics["loss"]) and not len(bad_layers) and not len(bad_grads):
            return
        if len(bad_layers):
            where = f"layer {bad_layers[0]} is the first whose output is not finite"
        elif not np.isfinite(metrics["loss"]):
            where = "all layers are finite, the output projection is not"
        else:
            where = f"the gradient of {self._parameter_names[bad_grads[0]]} is not finite"
        raise TrainingFailed(f"step {step}: loss {float(metrics['loss'])}: {where}; the last checkpoint is intact")

    def _scalars(self, step: int, metrics: dict[str, np.ndarray], seconds: float) -> dict[str, float]:
        tokens = self._config.data.batch_size * self._config.data.sequence_length
        line = {name: value.item() for name, value in metrics.items() if np.ndim(value) == 0}
        line |= {"tokens": step * tokens, "tokens_per_second": tokens / seconds, "step_seconds": seconds}
        if self._peak_flops is not None:
            line["mfu"] = self._flops_per_step / seconds / self._peak_flops
        memory = self._device.memory_stats()
        if memory and "peak_bytes_in_use" in memory:
            line["memory_bytes"] = memory["peak_bytes_in_use"]
        return line
