"""A run's compiled step, and the dense twin of an MoE run: what several benchmarks compare."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import moejax
from train.config import TrainConfig
from train.model import ModelSpec
from train.program import make_program
from train.step import make_loss

VOCAB = 257  # bytes and the separator


def active_parameters(config: TrainConfig) -> int:
    return ModelSpec.from_config(config, VOCAB).count_parameters()[1]


def dense_twin(config: TrainConfig) -> TrainConfig:
    """The dense model whose active parameters come nearest to the MoE's."""

    def dense(d_hidden: int) -> TrainConfig:
        return dataclasses.replace(
            config, model=dataclasses.replace(config.model, moe_layers="none", d_hidden=d_hidden)
        )

    target = active_parameters(config)
    widths = range(8, 8 * config.model.d_model, 4)
    return dense(min(widths, key=lambda width: abs(active_parameters(dense(width)) - target)))


class Compiled:
    """A run's step and its forward and backward pass alone, compiled for one device with random tokens."""

    def __init__(self, config: TrainConfig):
        self.config = config
        B, S = config.data.batch_size, config.data.sequence_length
        tokens = np.random.default_rng(0).integers(0, 256, (B, S), dtype=np.int32)
        positions = np.broadcast_to(np.arange(S, dtype=np.int32), (B, S))
        batch = dict(tokens=tokens, targets=tokens, segments=np.ones_like(tokens), positions=positions)
        self.batch = jax.tree.map(jnp.asarray, batch)
        program = make_program(config, VOCAB, moejax.make_mesh(devices=jax.devices()[:1]))
        with jax.set_mesh(program.mesh):
            self.state = program.init()
            self.program = program.train_step.lower(self.state, self.batch).compile()
            loss = jax.jit(jax.value_and_grad(make_loss(program.spec), has_aux=True))
            arguments = self.batch, jnp.float32(B * S), jax.random.key(0)
            gradients = loss.lower(self.state.params, *arguments).compile()
        self.gradients = lambda: gradients(self.state.params, *arguments)

    def step(self) -> Any:
        """One step; its state goes into the next, as in training."""
        self.state, metrics = self.program(self.state, self.batch)
        return metrics
