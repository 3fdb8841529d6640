"""The evaluations of a run in training, which a signal may cut short."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from typing import Any

import jax

from train import processes
from train.checkpoint import EVALUATED
from train.config import TrainConfig
from train.data import Corpus, num_validation_batches, validation_batches
from train.evaluate import Evaluation, evaluate
from train.feed import abstract_batch
from train.monitor import Bystander, Monitor
from train.program import Program
from train.signals import AskedToStop, Stop
from train.step import TrainState

log = logging.getLogger("moejax")


class Evaluator:
    """Evaluates on the whole validation split, or on as much of it as the config says, and reports what it found.

    Compiles, so all processes must make theirs at the same place.

    Args:
      rows: of each batch that this process reads.
      stop: at its request an evaluation is left, in all processes after the same batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        rows: slice,
        program: Program,
        monitor: Monitor | Bystander,
        stop: Stop,
    ):
        self._config, self._corpus, self._rows, self._program = config, corpus, rows, program
        self._monitor, self._stop = monitor, stop
        batch = abstract_batch(program.mesh, config.data.batch_size, config.data.sequence_length)
        self._step = processes.compile_together(program.eval_step, program.abstract_state.params, batch)

    def __call__(self, step: int, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """Evaluate after this step.

        Returns:
          The state with the watched tokens' first choices at this evaluation, and what its checkpoint is compared by;
          the state as it was and nothing when the evaluation was left.
        """
        try:
            evaluation = self._evaluate(state, whole=step == self._config.steps)
        except AskedToStop:
            log.info("the evaluation after step %d is left; the same command begins with it", step)
            return state, {}
        experts: dict[str, Any] = {}
        if evaluation.experts is not None:
            experts = evaluation.experts.metrics(jax.device_get(state.first_MW))
            state = dataclasses.replace(state, first_MW=evaluation.experts.first_MW)
        self._monitor.evaluation(step, evaluation.loss(), experts)
        return state, evaluation.standing(self._config.eval.max_batches)

    def _evaluate(self, state: TrainState, *, whole: bool) -> Evaluation:
        part = self._config.eval.max_batches
        if whole and part is not None:
            log.info("evaluating on the whole validation split")
        data = self._config.data
        sizes = self._corpus, data.batch_size, data.sequence_length, None if whole else part
        return evaluate(
            self._step,
            state.params,
            self._stop.checked(validation_batches(*sizes, self._rows)),
            self._program.mesh,
            experts_of_layers=self._program.spec.experts_of_layers,
            progress=partial(self._monitor.evaluating, total=num_validation_batches(*sizes)),
        )


def is_due(config: TrainConfig, step: int) -> bool:
    """Whether an evaluation comes after this step."""
    return step == config.steps or (config.eval.every > 0 and step % config.eval.every == 0)


def is_owed(config: TrainConfig, step: int, extra: dict[str, Any], whole: int) -> bool:
    """Whether the checkpoint of this step, with this `extra`, lacks its evaluation, as where a signal cut it short.

    That of the last step is to be over all `whole` tokens of the validation split.
    """
    needed = whole if step == config.steps else 1
    return is_due(config, step) and extra.get(EVALUATED, 0) < needed
