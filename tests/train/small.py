"""A small run for the tests: seconds, not minutes, but nothing left out."""

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from moejax.mesh import token_sharding
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from train.program import make_program

VOCAB = 29
MEASUREMENTS = ("tokens_per_second", "step_seconds", "mfu", "memory_bytes")


def config(**fields):
    """The small run, with whole groups replaced by keyword."""
    return dataclasses.replace(
        TrainConfig(
            steps=12,
            data=DataConfig(tokenizer="char", batch_size=8, sequence_length=16),
            model=ModelConfig(
                num_layers=2, d_model=16, num_heads=2, moe=MoEConfig(num_experts=8, d_hidden=8)
            ),
            optimizer=OptimizerConfig(warmup_steps=50),
            checkpoint=CheckpointConfig(every=5),
            eval=EvalConfig(every=0),
            log=LogConfig(every=1, tensorboard=False),
        ),
        **fields,
    )


def write_text(path: pathlib.Path) -> pathlib.Path:
    """A text of a few thousand characters with something to learn in it."""
    rng = np.random.default_rng(0)
    words = ["to be", "or not", "the quick", "brown fox", "jumps", "over", "a lazy dog"]
    path.write_text(" ".join(rng.choice(words, 900)) + "\n")
    return path


def write_config(path: pathlib.Path, run: TrainConfig) -> pathlib.Path:
    """A Python config file that returns `run`."""
    path.write_text(f"from train.config import *\n\ndef config():\n    return {run!r}\n")
    return path


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    """The run's metrics without what is measured, which are the only fields that may differ between two runs."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASUREMENTS} for line in lines]


def random_batch(run: TrainConfig, seed: int) -> dict[str, np.ndarray]:
    """A batch of two documents per row, with some padding."""
    B, S = run.data.batch_size, run.data.sequence_length
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (B, S), dtype=np.int32)
    segments = np.where(np.arange(S) < S // 3, 1, 2) * np.ones((B, 1), np.int32)
    segments[0, -3:] = 0
    positions = np.where(np.arange(S) < S // 3, np.arange(S), np.arange(S) - S // 3) * np.ones(
        (B, 1), np.int32
    )
    targets = np.where(segments > 0, (tokens * 7 + 3) % VOCAB, -1)
    arrays = dict(tokens=tokens, targets=targets, segments=segments, positions=positions)
    return {name: array.astype(np.int32) for name, array in arrays.items()}


class Steps:
    """Training steps without files: `state`, and `take(batch) -> metrics`."""

    def __init__(self, run: TrainConfig, data: int = 1, expert: int = 1, **axes: int):
        axes = dict(data=data, expert=expert, **axes)
        self.mesh = moejax.make_mesh(**axes, devices=jax.devices()[: math.prod(axes.values())])
        program = make_program(run, VOCAB, self.mesh)
        self.spec, self.step, self.eval_step = program.spec, program.train_step, program.eval_step
        with jax.set_mesh(self.mesh):
            self.state = program.init()

    def put(self, batch):
        return jax.device_put(jax.tree.map(jnp.asarray, batch), token_sharding(self.mesh))

    def take(self, batch):
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.step(self.state, self.put(batch))
        return metrics
