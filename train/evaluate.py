"""Evaluation on the validation split, during a run and of a finished one."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from train.checkpoint import BEST, EVALUATED, EXTENT, Checkpoints
from train.config import MeshConfig, TrainConfig
from train.config_io import load_config
from train.data import load_tokenizer, validation_batches
from train.errors import ConfigError
from train.feed import device_batch, process_rows
from train.inputs import read_began, read_inputs
from train.layers import moe_layers_of
from train.model import ModelSpec, make_mesh, product_precision
from train.observe import ExpertView
from train.reporter import QUEUED
from train.step import make_eval_step

log = logging.getLogger("moejax")

# Results that wait on the device: few enough that they take no memory worth the name.
IN_FLIGHT = 16
# Of further ones, what is said of pairs of experts is left where it is: E * E numbers of each layer.
OBSERVED = 16


@dataclass(frozen=True)
class Evaluation:
    """What was found on the validation split, batch by batch.

    Fields:
      totals: summed cross-entropy of each batch, in nats.
      counts: counted tokens of each batch.
      experts: what was seen of them; None for a dense model.
    """

    totals: np.ndarray
    counts: np.ndarray
    experts: ExpertView | None = None

    def loss(self, batches: int | None = None) -> float:
        """Mean cross-entropy in nats per token, of all batches or of the first so many."""
        return float(np.sum(self.totals[:batches], dtype=np.float64) / self.tokens(batches))

    def tokens(self, batches: int | None = None) -> int:
        """Counted tokens of all batches or of the first so many."""
        return int(np.sum(self.counts[:batches], dtype=np.int64))

    def standing(self, batches: int | None) -> dict[str, float]:
        """What a checkpoint is compared by: the evaluations of a run that are over the same first batches.

        The last evaluation is over the whole split, but its loss on those batches compares with the others. The number
        of tokens of the whole evaluation goes with it.
        """
        return {BEST: self.loss(batches), EXTENT: self.tokens(batches), EVALUATED: self.tokens()}


def evaluate(
    eval_step: Callable[..., Any],
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
    *,
    experts_of_layers: Sequence[int],
    progress: Callable[[int], None] = lambda done: None,
) -> Evaluation:
    """Evaluate batch after batch; at most `QUEUED` are before the device, and at most `IN_FLIGHT` results wait on it.

    Args:
      experts_of_layers: how many experts each MoE layer has.
      progress: is told how many batches are done whenever some have been fetched.
    """
    fetched, pending, first_MW = [], [], None
    for number, batch in enumerate(batches):
        sums = eval_step(params, device_batch(batch, mesh))
        first = sums.pop("first", None)
        if number == 0:
            first_MW = first
        if number >= OBSERVED:
            sums.pop("together", None)
        pending.append(sums)
        if len(pending) > QUEUED:
            jax.block_until_ready(pending[-1 - QUEUED])
        if len(pending) == IN_FLIGHT:
            fetched += jax.device_get(pending)
            pending.clear()
            progress(len(fetched))
    fetched += jax.device_get(pending)
    by_name = lambda name: np.asarray([sums[name] for sums in fetched])  # noqa: E731
    return Evaluation(by_name("loss"), by_name("tokens"), ExpertView.of(fetched, first_MW, experts_of_layers))


def fitting_mesh(config: TrainConfig) -> Mesh:
    """The run's own mesh if these devices allow it, otherwise the largest expert axis that they do."""
    num_devices = jax.device_count()
    own = dataclasses.replace(config.mesh, data=-1)
    if num_devices % (own.expert_node * own.expert * own.tensor):
        experts = [layer.num_experts for layer in moe_layers_of(config.model).values()]
        own = MeshConfig(expert=math.gcd(num_devices, *experts))
    return make_mesh(own)


def restore_params(
    run_dir: Path, config: TrainConfig, abstract_params: Any
) -> tuple[int, Any, dict[str, Any]]:
    """Step, parameters and `extra` of a run's newest sound checkpoint.

    Raises:
      ConfigError: the run has none.
    """
    with Checkpoints(run_dir / "checkpoints", config.checkpoint) as checkpoints:
        restored = checkpoints.restore_params(abstract_params)
    if restored is None:
        raise ConfigError("RUN", run_dir, "has no checkpoint yet")
    return restored


def evaluate_run(run_dir: str) -> tuple[float, int]:
    """Evaluate the newest sound checkpoint of a run on its whole validation split.

    Returns:
      The mean loss in nats per token, and the number of tokens.

    Raises:
      ConfigError: not a run directory, no sound checkpoint, or its data has gone.
    """
    directory = Path(run_dir)
    config = load_config(directory / "config.yaml")
    tokenizer = load_tokenizer(directory)
    inputs = read_inputs(config, directory, config, read_began(directory), tokenizer)
    for line in inputs.moved + inputs.warnings:
        log.warning("%s", line)
    corpus = inputs.corpus
    spec = ModelSpec.from_config(config, tokenizer.vocab_size)
    mesh = fitting_mesh(config)
    with jax.set_mesh(mesh), product_precision(config):
        step, params, extra = restore_params(directory, config, spec.abstract_params(mesh))
        if extra["content_hash"] != corpus.content_hash:
            rule = "its content has changed since the run; on another split the loss would say nothing"
            raise ConfigError("data.path", config.data.path, rule)
        batch_size = math.ceil(config.data.batch_size / mesh.size) * mesh.size
        rows = process_rows(mesh, batch_size)
        batches = validation_batches(corpus, batch_size, config.data.sequence_length, rows=rows)
        evaluation = evaluate(
            jax.jit(make_eval_step(spec, mesh)),
            params,
            batches,
            mesh,
            experts_of_layers=spec.experts_of_layers,
        )
    loss, tokens = evaluation.loss(), evaluation.tokens()
    line = f"eval/loss {loss:.6f} at step {step} over {tokens:,} tokens"
    try:
        with (directory / "log.txt").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:  # a run that may only be read can still be evaluated
        log.warning("%s could not be added to log.txt: %s", line, error.strerror)
    return loss, tokens
