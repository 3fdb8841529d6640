"""A run's compiled functions on a mesh: what the training loop, the benchmarks and the tests all drive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.mesh import EXPERT_AXES
from train.config import TrainConfig
from train.model import UNTUNED, ModelSpec, Tuning
from train.optimizer import make_optimizer, make_schedule
from train.step import Batch, Metrics, TrainState, make_eval_step, make_init, make_train_step, state_shardings


@dataclass(frozen=True)
class Program:
    """The functions of one run, jitted; call them under `jax.set_mesh(mesh)`.

    Fields:
      spec: the model without its numbers.
      mesh: the devices.
      abstract_state: shape, dtype and sharding of every leaf of the state, as a checkpoint is read.
      init: `() -> state` before the first step.
      train_step: `(state, batch) -> (state, metrics)`; the state that goes in is gone afterwards.
      eval_step: `(params, batch) -> sums over the batch`; see `make_eval_step`.
    """

    spec: ModelSpec
    mesh: Mesh
    abstract_state: TrainState
    init: Callable[[], TrainState]
    train_step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    eval_step: Callable[[dict[str, Any], Batch], Metrics]


def make_program(config: TrainConfig, vocab_size: int, mesh: Mesh, tuning: Tuning = UNTUNED) -> Program:
    """The program of a run; nothing is compiled before it is called.

    Args:
      vocab_size: of the tokenizer.
      tuning: where the config says `auto`; the state is the same with every one.
    """
    spec = ModelSpec.from_config(config, vocab_size, tuning)
    schedule = make_schedule(config.optimizer, config.steps)
    optimizer = make_optimizer(config.optimizer, config.steps, spec)
    init = make_init(spec, optimizer, config.seed)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(init)
        shardings = state_shardings(spec, shapes, mesh)
    options = compiler_options(mesh, config.model.moe.chunks)
    place = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)  # noqa: E731
    replicated = NamedSharding(mesh, P())  # what is fetched, every process has whole
    return Program(
        spec,
        mesh,
        abstract_state=jax.tree.map(place, shapes, shardings),
        init=jax.jit(init, out_shardings=shardings),
        train_step=jax.jit(
            make_train_step(spec, optimizer, schedule, mesh),
            donate_argnums=0,
            out_shardings=(shardings, replicated),
            compiler_options=options,
        ),
        eval_step=jax.jit(make_eval_step(spec, mesh), out_shardings=replicated, compiler_options=options),
    )


def compiler_options(mesh: Mesh, chunks: int) -> dict[str, bool | int] | None:
    """What XLA is told beyond its defaults: on CPU nothing, on GPUs

    - that a resumed run gives the same bits: no operation whose order of summation is left to chance, above all the
      scatter-add of the embedding's gradient;
    - that the exchanges of as many chunks as a layer is cut into may be under way at once, at every level. By default
      it is one: the scheduler then lets a layer's exchanges towards the experts run one by one before the first
      product, and hides only those of the way back.
    """
    if mesh.devices.flat[0].platform != "gpu":
        return None
    levels = sum(mesh.shape[axis] > 1 for axis in EXPERT_AXES)
    in_flight = max(chunks * levels, 1)
    return {
        "xla_gpu_exclude_nondeterministic_ops": True,
        "xla_gpu_experimental_parallel_collective_overlap_limit": in_flight,
    }
