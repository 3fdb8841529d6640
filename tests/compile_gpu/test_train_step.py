"""Whole training steps in bf16, as `moejax train` compiles them: kernels, collectives, and what fits a GPU.

No cuDNN is there to compile for, so attention is XLA's, which holds the scores: a GPU that runs takes less memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import moejax
from configs import moe_1b_64x
from moejax.mesh import token_sharding
from tests.compile_gpu.h200 import Program, compile_for
from tests.compile_gpu.test_moe_layer import BUCKET
from tests.compile_gpu.test_moe_layer import T as LAYER_T
from train.config import TrainConfig
from train.model import ModelSpec
from train.optimizer import make_optimizer, make_schedule
from train.step import BATCH_FIELDS, make_init, make_train_step, state_shardings

pytestmark = pytest.mark.compile_gpu


class Case(NamedTuple):
    make_config: Callable[[], TrainConfig]
    vocabulary: int
    devices: int
    calls: dict[str, int]


def scaled() -> TrainConfig:
    """The config with two layers, 8 experts and half the sequence, for one GPU."""
    run = moe_1b_64x.config()
    model = dataclasses.replace(
        run.model, num_layers=2, moe=dataclasses.replace(run.model.moe, num_experts=8, top_k=2)
    )
    return dataclasses.replace(
        run,
        model=model,
        data=dataclasses.replace(run.data, batch_size=4, sequence_length=2048),
        optimizer=dataclasses.replace(run.optimizer, accumulation_steps=2),
        mesh=dataclasses.replace(run.mesh, expert=1),
    )


CASES = {
    "scaled on 1": Case(
        scaled,
        256,
        1,
        {
            "mosaic_gpu_v2": 7,
            "zero_tail_kernel": 9,
            "clean_kernel": 4,
            "spoil_kernel": 2,
            "moejax_make_plan": 2,
            "moejax_permute": 3,
            "moejax_unpermute": 2,
        },
    ),
    # The vocabulary is that of the model which the config follows. The loops of further rounds hold all once more,
    # the forward pass again in backward's loop.
    "moe_1b_64x on 8": Case(
        moe_1b_64x.config,
        50304,
        8,
        {
            "mosaic_gpu_v2": 14,
            "zero_tail_kernel": 18,
            "clean_kernel": 8,
            "spoil_kernel": 4,
            "moejax_make_plan": 8,
            "moejax_permute": 16,
            "moejax_unpermute": 14,
        },
    ),
}


@pytest.fixture(scope="module")
def compiled(h200s):
    """`compiled(case)`: the config and its step's program."""

    @functools.cache
    def compile_case(case: str) -> tuple[TrainConfig, Program]:
        make_config, vocabulary, count, _ = CASES[case]
        run, devices = make_config(), h200s(count)
        spec = ModelSpec.from_config(run, vocabulary)
        optimizer = make_optimizer(run.optimizer, run.steps, spec)
        mesh = moejax.make_mesh(expert=run.mesh.expert, devices=devices)
        with jax.set_mesh(mesh):
            shapes = jax.eval_shape(make_init(spec, optimizer, run.seed))
            shardings = state_shardings(spec, shapes, mesh)
            place = lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at)  # noqa: E731
            state = jax.tree.map(place, shapes, shardings)
            tokens = (run.data.batch_size, run.data.sequence_length)
            batch = {
                name: jax.ShapeDtypeStruct(tokens, jnp.int32, sharding=token_sharding(mesh))
                for name in BATCH_FIELDS
            }
            step = make_train_step(spec, optimizer, make_schedule(run.optimizer, run.steps), mesh)
            step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
            return run, compile_for(devices[0], step, state, batch)

    return compile_case


@pytest.mark.parametrize("case", CASES)
def test_experts_are_kernels(compiled, case):
    """Layers are a scan, so each kernel stands in the program once per pass, however many layers there are."""
    run, program = compiled(case)
    # Backward computes plans and the first grouped product again: of all products it keeps only those of XLA's own.
    assert program.custom_calls == CASES[case].calls
    tokens = run.data.batch_size * run.data.sequence_length // run.optimizer.accumulation_steps
    model = run.model
    # The largest are those of the logits, in chunks, and of attention, traced for the whole batch; a dense fallback
    # for the experts would be larger.
    logits = 2 * model.loss_chunk * model.d_model * CASES[case].vocabulary
    attention = 2 * tokens * model.d_model * max(3 * model.d_model, run.data.sequence_length)
    assert max(program.dot_flops) <= max(logits, attention)


def test_one_gpu_communicates_nothing(compiled):
    _, program = compiled("scaled on 1")
    assert not program.collectives(at_least=0)


def test_collectives_on_eight_gpus(compiled):
    run, program = compiled("moe_1b_64x on 8")
    model, parts = run.model, run.optimizer.accumulation_steps
    T, D = run.data.batch_size * run.data.sequence_length // parts // 8, model.d_model
    found = program.collectives(at_least=2**20)
    # Forward forth and back, forth again in backward, gradients back and forth; each with its small message but two.
    # Buckets as in test_moe_layer.
    bucket = T * BUCKET // LAYER_T
    exchanged = {
        f"all-to-all bf16[{8 * bucket},{D}]": 5,
        f"all-to-all f32[{8 * bucket},{2 * model.moe.top_k}]": 3,
        f"all-to-all bf16[{2 * bucket},{D}]": 5,  # of further rounds
    }
    assert {name: n for name, n in found.items() if name.startswith("all-to-all")} == exchanged
    # All else sums gradients of what every device has whole: attention, embeddings, router.
    assert {name.split()[0] for name in found} == {"all-to-all", "all-reduce"}


def test_moe_1b_64x_fits_a_gpu_of_80_gb(compiled):
    """The promise of the config, at its own batch."""
    _, program = compiled("moe_1b_64x on 8")
    total = program.argument_bytes + program.output_bytes + program.temporary_bytes
    # 80 GB cards show about 79 GiB, of which jax takes three quarters at the start unless told otherwise.
    assert total <= 0.75 * 79 * 2**30, f"{total / 2**30:.1f} GiB"
