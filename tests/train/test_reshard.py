"""A checkpoint of any layout is read on any other: bit by bit, the optimizer too, and the loss goes on as before.

A further mesh axis is one more row of LAYOUTS.
"""

import jax
import numpy as np
import pytest

import moejax
from tests import tolerance
from tests.train import small
from train.checkpoint import Checkpoints
from train.config import CheckpointConfig, MeshConfig
from train.feed import device_batch
from train.leaves import named_leaves
from train.program import make_program

pytestmark = pytest.mark.landing

LAYOUTS = {
    "one device": dict(),
    "data 2": dict(data=2),
    "expert 2": dict(expert=2),
    "data 4": dict(data=4),
    "data 2, expert 2": dict(data=2, expert=2),
    "expert 4": dict(expert=4),
    "tensor 2": dict(tensor=2),
    "tensor 2, expert 2": dict(tensor=2, expert=2),
    "2 nodes of 2 experts": dict(expert_node=2, expert=2),
    "data 2, expert 2, fsdp": dict(data=2, expert=2, fsdp=True),
}
QUICK = ("2 nodes of 2 experts",)


def program_on(layout):
    axes = {"data": 1} | LAYOUTS[layout]
    run = small.config(mesh=MeshConfig(**axes))
    axes.pop("fsdp", None)
    mesh = moejax.make_mesh(**axes, devices=jax.devices()[: int(np.prod(list(axes.values())))])
    return make_program(run, small.VOCAB, mesh)


def steps(program, state, numbers):
    """The state after some steps, and their losses."""
    losses = []
    with jax.set_mesh(program.mesh):
        for number in numbers:
            batch = device_batch(small.random_batch(small.config(), number), program.mesh)
            state, metrics = program.train_step(state, batch)
            losses.append(float(metrics["loss"]))
    return state, losses


@pytest.fixture(scope="module")
def trained():
    """A state whose moments are not zero, on the host."""
    program = program_on("one device")
    with jax.set_mesh(program.mesh):
        state = program.init()
    return jax.device_get(steps(program, state, range(3))[0])


def saved(directory, state, layout):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program_on(layout).abstract_state)
    with Checkpoints(directory, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, jax.device_put(state, shardings), {}, {})


@pytest.mark.parametrize(
    "source", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in LAYOUTS]
)
def test_bitwise_on_every_other_layout(tmp_path, trained, source):
    saved(tmp_path, trained, source)
    expected = {name: np.asarray(leaf).tobytes() for name, leaf in named_leaves(trained).items()}
    assert any(name.startswith("opt_state") and any(bits) for name, bits in expected.items())
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        for target in LAYOUTS:
            abstract = program_on(target).abstract_state
            _, state, _, _ = checkpoints.restore(abstract)
            read = {name: np.asarray(leaf).tobytes() for name, leaf in named_leaves(state).items()}
            assert read == expected, target
            for leaf, asked in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
                assert leaf.sharding == asked.sharding


@pytest.mark.slow
def test_the_loss_goes_on_within_rounding(tmp_path, trained):
    program = program_on("one device")
    _, expected = steps(program, jax.device_put(trained), range(3, 9))
    saved(tmp_path, trained, "data 2, expert 2")
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        for target in ("expert 4", "data 4", "tensor 2, expert 2", "2 nodes of 2 experts"):
            program = program_on(target)
            _, state, _, _ = checkpoints.restore(program.abstract_state)
            tolerance.assert_close(
                steps(program, state, range(3, 9))[1], expected, tolerance.F32_MODEL, target
            )
