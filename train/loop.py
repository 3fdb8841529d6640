"""The training loop, top to bottom."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moejax.cost import peak_flops, train_flops_per_token
from train import processes
from train.checkpoint import Checkpoints
from train.config import TrainConfig
from train.config_io import earlier_config, refuse_other_run, save_config
from train.data import Corpus, TokenStream, TrainingBatches
from train.ending import closing_after_errors
from train.errors import ConfigError, Interrupted, NotFinite
from train.evaluator import Evaluator, is_due, is_owed
from train.feed import abstract_batch, device_batch, process_rows
from train.fields import flatten
from train.inputs import Inputs, marks, read_began, read_inputs
from train.leaves import bytes_of
from train.lock import lock_run
from train.logs import held_back
from train.metrics import FILE_NAME as METRICS
from train.model import ModelSpec, make_mesh, product_precision
from train.monitor import Bystander, Monitor
from train.program import Program, make_program
from train.reporter import Reporter
from train.selfcheck import check_collectives, check_devices
from train.signals import Stop, stop_signals
from train.step import TrainState
from train.tuner import Tuner
from train.validation import validate
from train.watchdog import Watchdog
from train.workdir import Workdir

log = logging.getLogger("moejax")

MAX_ROLLBACKS = 10


def train(config: TrainConfig, name: str) -> None:
    """Run `config` to its last step, from the newest sound checkpoint of its workdir if there is one.

    Args:
      name: of the config; part of the default workdir.

    Raises:
      ConfigError: bad input; nothing has been written.
      TrainingFailed: NaN, a full disk; the last good checkpoint is intact.
      Interrupted: a signal, after a checkpoint.
    """
    check_devices()
    with processes.refusing_together():
        validate(config, jax.device_count())
        if config.workdir is None and jax.process_count() > 1:
            raise ConfigError("workdir", "(nothing)", "must be given, so that all processes have the same")
        workdir = Workdir(config.workdir, name)
    failure = None
    for attempt in range(MAX_ROLLBACKS + 1):
        try:
            return _train(config, workdir, failure)
        except NotFinite as error:
            if config.checkpoint.on_nan != "rollback" or attempt == MAX_ROLLBACKS or error.stopping:
                raise
            failure = error


def _train(config: TrainConfig, directory: Workdir, failure: NotFinite | None) -> None:
    """One attempt; after a `failure` the data goes on behind the batch that it came from."""
    # ---- input: everything that can be refused is refused before the workdir exists ----
    with processes.refusing_together():
        inputs = _read_inputs(config, directory)
        config, tokenizer, corpus = inputs.config, inputs.tokenizer, inputs.corpus
        mesh = make_mesh(config.mesh)
        batch_size, sequence_length = config.data.batch_size, config.data.sequence_length
        rows = process_rows(mesh, batch_size)
        batches = TrainingBatches(
            corpus, batch_size=batch_size, sequence_length=sequence_length, seed=config.seed, rows=rows
        )
    _require_agreement(config, corpus)
    speeds = check_collectives(mesh) if _needs_check(mesh) else []
    tuner = Tuner(config, mesh)
    program = make_program(config, tokenizer.vocab_size, mesh, tuner.tuning)

    with ExitStack() as stack:
        stack.enter_context(closing(batches))
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(product_precision(config))
        with processes.refusing_together():
            directory.make()
            workdir = directory.path
            if processes.is_first():
                stack.enter_context(lock_run(workdir))
        stop = stack.enter_context(stop_signals())

        # ---- restore, or begin ----
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", config.checkpoint))
        with held_back() as warnings:
            first, state, extra = _restore(checkpoints, program, batches)
        whole = corpus.validation.num_predictions
        owes_evaluation = first > 0 and is_owed(config, first, extra, whole)
        # Only now is nothing left that could refuse to go on: a refused resume leaves the run as it was.
        with processes.refusing_together():
            if processes.is_first():
                directory.require_places(tensorboard=config.log.tensorboard)
                if first < config.steps:
                    directory.require_room(bytes_of(program.abstract_state), config.steps)
                save_config(config, workdir / "config.yaml")
                tokenizer.save(workdir)
            monitor = _monitor(workdir, config, program.spec, mesh, first, evaluated=not owes_evaluation)

        # ---- reports ----
        stack.push(monitor)
        if failure is not None:
            _leave_out(batches, failure, first)
        stack.enter_context(_knowing_its_batch(batches.get_state()["next_batch"] - first, stop))
        watchdog = stack.enter_context(
            Watchdog(workdir, factor=config.log.stall_factor, seconds=config.log.stall_seconds)
        )
        stack.enter_context(closing_after_errors())
        reporter = Reporter(monitor, program.spec, mesh, checkpoints.describe, watchdog)
        for record in warnings:
            log.handle(record)
        log.info("run directory: %s", workdir)
        for line in inputs.moved:
            log.info("%s", line)
        for line in inputs.warnings:
            log.warning("%s", line)
        _introduce(program.spec, corpus, mesh, speeds)
        for line in tuner.describe(program.spec):
            log.info("%s", line)
        if first:
            done = first == config.steps and not owes_evaluation
            log.info("already finished: all %d steps are done" if done else "going on after step %d", first)

        batch_shape = abstract_batch(mesh, batch_size, sequence_length)

        def tuned_step() -> Callable[..., Any]:
            tuned = make_program(config, tokenizer.vocab_size, mesh, tuner.tuning)
            return processes.compile_now(tuned.train_step, program.abstract_state, batch_shape)

        if tuner.choose_shadows(first, program.spec, state.params):
            train_step = tuned_step()
        else:
            train_step = processes.compile_together(program.train_step, program.abstract_state, batch_shape)
        evaluator = Evaluator(config, corpus, rows, program, monitor, stop)

        # ---- the loop; a run that was stopped in an evaluation begins with it ----
        for step in range(first if owes_evaluation else first + 1, config.steps + 1):
            last = step == config.steps
            logged = last or step == 1 or _due(step, config.log.every)
            if step > first:
                state, metrics = train_step(state, device_batch(next(batches), mesh))
                reporter.add(step, metrics, logged=logged)

            found: dict[str, float] = {}
            is_best = False
            if is_due(config, step):
                reporter.flush()
                with monitor.paused(), watchdog.paused():
                    state, found = evaluator(step, state)
                    is_best = bool(found) and checkpoints.would_be_best(found)

            stopping = stop.here()
            due = _due(step, config.checkpoint.every) or (logged and checkpoints.is_late())
            if (step > first or found) and (last or due or is_best or stopping):
                reporter.flush()
                with monitor.paused(), watchdog.paused():
                    reporter.refuse_broken(step, state.params)
                    extra = {**marks(corpus, tokenizer), **found}
                    checkpoints.save(step, state, batches.get_state(), extra)

            if stopping and not (last and found):
                with watchdog.paused():
                    checkpoints.wait()
                raise Interrupted(stop.number, step)
            if not last and _due(step, config.eval.every):
                with monitor.paused(), watchdog.paused():
                    if tuner.choose_shadows(step, program.spec, state.params):
                        train_step = tuned_step()
        with watchdog.paused():
            checkpoints.wait()


def _read_inputs(config: TrainConfig, directory: Workdir) -> Inputs:
    """The data that the config names, and the config with the paths at which it is.

    Raises:
      ConfigError: the data cannot be used, or the workdir is that of another run.
    """
    workdir = directory.path
    earlier = None if directory.is_new else earlier_config(workdir)
    if earlier is not None:
        refuse_other_run(workdir, earlier, config)
    return read_inputs(config, workdir, earlier, None if directory.is_new else read_began(workdir))


def _restore(
    checkpoints: Checkpoints, program: Program, batches: TrainingBatches
) -> tuple[int, TrainState, dict[str, Any]]:
    """Finished steps, state and `extra` of the newest sound checkpoint, behind which `batches` go on; or a new run's.

    Raises:
      ConfigError: the run has already done more steps, or see `Checkpoints.restore`.
    """
    with processes.refusing_together():
        checkpoints.recover()
    restored = checkpoints.restore(program.abstract_state, accept=batches.set_state)
    if restored is None:
        if processes.is_first() and _has_content(metrics := checkpoints.directory.parent / METRICS):
            log.warning(
                "there is no checkpoint: the run begins anew, and the steps in %s are dropped", metrics
            )
        return 0, program.init(), {}
    first, state, _, extra = restored
    steps = program.spec.config.steps
    if steps < first:
        raise ConfigError("steps", steps, f"must be at least {first}, which this run has already done")
    return first, state, extra


def _require_agreement(config: TrainConfig, corpus: Corpus) -> None:
    """Versions, config and data must be the same in all processes; the first that differs is the one named."""
    processes.require_agreement(
        {
            "versions": processes.versions(),
            **{name: repr(value) for name, value in flatten(config).items()},
            "data.path": corpus.content_hash,
            "data.tokenizer": corpus.tokenizer_hash,
        }
    )


@contextmanager
def _knowing_its_batch(offset: int, stop: Stop) -> Iterator[None]:
    """A NaN in the block learns which batch it came from: that of step s is number s - 1 + `offset`."""
    try:
        yield
    except NotFinite as error:
        error.next_batch, error.stopping = error.step + offset, stop.number > 0
        raise


def _leave_out(batches: TrainingBatches, failure: NotFinite, step: int) -> None:
    """Move the data from behind `step` to behind the batch that gave NaN: all batches up to that one are left out."""
    log.warning(
        "step %d gave NaN: back to step %d, and on with the batch after the bad one", failure.step, step
    )
    batches.set_state(batches.get_state() | {"next_batch": failure.next_batch})


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _needs_check(mesh: Mesh) -> bool:
    """Whether the wires between devices can be at fault: not between the CPU devices of one process."""
    return jax.process_count() > 1 or (mesh.size > 1 and mesh.devices.flat[0].platform == "gpu")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _monitor(
    workdir: Path, config: TrainConfig, spec: ModelSpec, mesh: Mesh, first: int, *, evaluated: bool
) -> Monitor | Bystander:
    if not processes.is_first():
        return Bystander()
    return Monitor(
        workdir,
        config.log,
        total_steps=config.steps,
        start_step=first,
        evaluated=evaluated,
        tokens_per_step=config.data.batch_size * config.data.sequence_length,
        mfu_per_token=_mfu_per_token(spec, mesh),
    )


def _introduce(spec: ModelSpec, corpus: Corpus, mesh: Mesh, speeds: Sequence[str]) -> None:
    """Say in the log what is trained, on what, where, and how fast its wires are."""
    total, active = spec.count_parameters()
    log.info("parameters: %s in all, %s active per token", f"{total:,}", f"{active:,}")
    log.info(
        "data: %s, %s; sha256 %s",
        _size("training", corpus.train),
        _size("validation", corpus.validation),
        corpus.content_hash,
    )
    if corpus.ignored_files:
        log.warning("data.path: %d files of no known kind were left out", corpus.ignored_files)
    log.info("devices: %d x %s as %s", mesh.size, mesh.devices.flat[0].device_kind, dict(mesh.shape))
    for line in speeds:
        log.info("self-check: %s", line)


def _size(split: str, stream: TokenStream) -> str:
    return f"{stream.num_tokens:,} {split} tokens in {stream.num_documents:,} documents"


def _mfu_per_token(spec: ModelSpec, mesh: Mesh) -> float | None:
    """Model FLOPs utilisation per token/s, against the devices' peak in the run's precision; None if not known."""
    peak = peak_flops(mesh.devices.flat[0].device_kind, spec.config.precision)
    if peak is None:
        return None
    model, sequence_length = spec.config.model, spec.config.data.sequence_length
    active = spec.active_matrix_parameters()
    flops = train_flops_per_token(active, model.num_layers, model.d_model, sequence_length)
    return flops / (peak * mesh.size)
