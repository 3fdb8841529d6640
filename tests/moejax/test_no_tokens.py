"""A batch without a single token, on one device and on two: nothing comes out, and every gradient is zero.

In `test_the_smallest_program_compiles` a partitioner of XLA (Shardy's ManualComputationUnusedInputsPattern) dies in
jax 0.11.2. It is why jax 0.11 gets the partitioner before Shardy (`moejax.partitioner`).
"""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import moejax
from moejax import partitioner

D, F, E = 8, 6, 4


def test_jax_011_partitions_without_shardy(monkeypatch):
    shardy = jax.config.jax_use_shardy_partitioner
    chosen = {}
    monkeypatch.delenv(partitioner.VARIABLE, raising=False)
    monkeypatch.setattr(jax.config, "update", chosen.__setitem__)
    for version, expected in (
        ((0, 10, 2), {}),
        ((0, 11, 2), {partitioner.VARIABLE.lower(): False}),
        ((0, 12, 0), {}),
    ):
        chosen.clear()
        monkeypatch.setattr(jax, "__version_info__", version)
        partitioner.avoid_shardy_where_it_dies()
        assert chosen == expected
    monkeypatch.setenv(partitioner.VARIABLE, "1")
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    partitioner.avoid_shardy_where_it_dies()
    assert not chosen and jax.config.jax_use_shardy_partitioner == shardy


def test_to_import_moejax_is_to_choose(monkeypatch):
    monkeypatch.delenv(partitioner.VARIABLE, raising=False)
    for version, shardy in (((0, 10, 2), True), ((0, 11, 2), False)):
        program = (
            f"import jax\nfrom flax import nnx\njax.__version_info__ = {version}\nimport moejax\n"
            f"assert jax.config.jax_use_shardy_partitioner == {shardy}"
        )
        subprocess.run([sys.executable, "-c", program], check=True)


def test_the_smallest_program_compiles():
    split = jax.shard_map(lambda a, y: a.sum() + y, mesh=mesh(2), in_specs=P("expert"), out_specs=P("expert"))
    assert (jax.jit(lambda y: split(jnp.zeros((0, 4)), y))(jnp.ones((2, 4))) == 1).all()


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("shape", [(0, D), (0, 5, D), (2, 0, D)], ids=str)
def test_layer(devices, shape):
    options = dict(balance_weight=0.1, z_weight=0.1, balance_over="sequence" if len(shape) > 2 else "batch")
    layer = moejax.MoE(D, F, E, rngs=nnx.Rngs(0), chunks=2, **options)

    @nnx.jit
    def run(layer, x):
        def value(layer, x):
            y, stats = layer(x)
            return jnp.sum(y) + stats.aux_loss, (y, stats)

        return nnx.value_and_grad(value, argnums=(0, 1), has_aux=True)(layer, x)

    with jax.set_mesh(mesh(devices)):
        (value, (y, stats)), (grads, dx) = run(layer, jnp.zeros(shape))
    assert y.shape == dx.shape == shape and value == 0
    assert stats.load_E.tolist() == [0] * E and stats.rounds == 1 and stats.dropped == stats.invalid == 0
    assert all((gradient == 0).all() for gradient in jax.tree.leaves(grads))


@pytest.mark.landing
@pytest.mark.parametrize("devices", [1, 2])
def test_transformer(devices):
    sizes = dict(vocab_size=16, num_layers=2, d_model=D, num_heads=2, d_hidden=F)
    moe = dict(d_hidden=F, num_experts=E)
    model = moejax.Transformer(**sizes, moe_layers=(1,), moe=moe, rngs=nnx.Rngs(0))

    @nnx.jit
    def run(model, tokens):
        def value(model):
            hidden, *_ = model(tokens)
            return model.loss(hidden, tokens, chunk=8), hidden

        return nnx.value_and_grad(value, has_aux=True)(model)

    with jax.set_mesh(mesh(devices)):
        (loss, hidden), grads = run(model, jnp.zeros((0, 5), jnp.int32))
    assert hidden.shape == (0, 5, D) and loss == 0
    assert all((gradient == 0).all() for gradient in jax.tree.leaves(grads))


def mesh(count):
    return moejax.make_mesh(expert=count, devices=jax.devices()[:count])
