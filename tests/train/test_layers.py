"""Layers of one model with routers and numbers of experts of their own."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from flax import nnx

from moejax.routing import make_router
from tests import tolerance
from tests.train import small
from train.config import LogConfig, MoEConfig, OptimizerConfig, RoutingConfig
from train.errors import ConfigError
from train.model import ModelSpec
from train.step import make_eval_step
from train.validation import validate

pytestmark = pytest.mark.landing


def run_with(router, layer_routers=None, layer_experts=None, num_layers=2, accumulation=1, **routing):
    run = small.config(
        optimizer=OptimizerConfig(warmup_steps=50, accumulation_steps=accumulation),
        log=LogConfig(every=1, dead_after=2, tensorboard=False),
    )
    moe = MoEConfig(
        num_experts=8,
        d_hidden=8,
        router=router,
        layer_routers=layer_routers,
        layer_experts=layer_experts,
        routing=RoutingConfig(**routing),
    )
    return dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=num_layers, moe=moe))


def test_single_layers_have_routers_of_their_own():
    run = run_with("sigmoid", "0:hash", hash_seed=3, bias_rate=0.01)
    validate(run, 1)
    trainer, batch = small.Steps(run), small.random_batch(run, 0)
    load = np.asarray(trainer.take(batch)["moe/layers/load"])
    hashed, sigmoid = (trainer.state.params["blocks"][layer]["ffn"] for layer in (0, 1))
    assert "router" not in hashed, "it learns nothing"
    bias = np.asarray(sigmoid["router"]["selection_bias_E"])
    assert np.abs(bias).max() == np.float32(0.01)
    router = make_router("hash", 16, 8, hash_seed=3, rngs=nnx.Rngs(0))
    tokens = batch["tokens"].reshape(-1)
    routing = router(np.zeros((len(tokens), 16), np.float32), token_ids_T=tokens)
    ids = np.asarray(routing.ids_TK)[batch["segments"].reshape(-1) > 0]
    np.testing.assert_array_equal(load[0], [np.sum(ids == e) for e in range(8)])
    assert not np.array_equal(load[0], load[1])


# Kinds 4, 8, 4, 8: two blocks that repeat twice. Remat keeps the repetitions in a loop.
def four_and_eight(router, accumulation=1, **routing):
    run = run_with(router, None, "0:4,2:4", 4, accumulation, **routing)
    return dataclasses.replace(run, model=dataclasses.replace(run.model, remat="full"))


@pytest.mark.landing
def test_layers_have_numbers_of_experts_of_their_own():
    run = four_and_eight("sigmoid", accumulation=2, bias_rate=0.01, balance_weight=0.01)
    validate(run, 2)
    trainer = small.Steps(run, 1, 2)
    metrics = jax.device_get(trainer.take(small.random_batch(run, 0)))
    load = metrics["moe/layers/load"]
    assert load.shape == (4, 8) and (load.sum(axis=1) == 2 * (8 * 16 - 3)).all() and not load[::2, 4:].any()
    for layer, experts in enumerate((4, 8, 4, 8)):
        share = load[layer, :experts] / load[layer].sum()
        assert metrics["moe/layers/max_vio"][layer] == pytest.approx(share.max() * experts - 1, abs=1e-6)
        entropy = -np.sum(share * np.log(share)) / math.log(experts)
        assert metrics["moe/layers/load_entropy"][layer] == pytest.approx(entropy, abs=1e-6)
        ffn = trainer.state.params["blocks"][layer % 2]["ffn"]
        assert ffn["experts"]["w_out"].shape == (2, experts, 8, 16)
        bias = np.asarray(ffn["router"]["selection_bias_E"])[layer // 2]
        even = load[layer].sum() / experts
        np.testing.assert_array_equal(bias, np.float32(0.01) * np.sign(even - load[layer, :experts]))


@pytest.mark.slow
def test_experts_that_a_layer_lacks_are_not_dead():
    run = four_and_eight("one")
    trainer = small.Steps(run)
    dead = [jax.device_get(trainer.take(small.random_batch(run, 0))) for _ in range(2)][1]
    assert dead["moe/dead_experts"] == 2 * (3 + 7), "one expert of each layer has all tokens"


@pytest.mark.slow
def test_numbers_of_experts_train_alike_on_devices_and_in_parts():
    """Loss and gradients with accumulation, under the batch's balance loss, are those without, on any layout."""
    sums = []
    for layout, accumulation in (((1, 1), 1), ((2, 4), 1), ((1, 2), 4)):
        run = four_and_eight("topk", accumulation)
        trainer = small.Steps(run, *layout)
        taken = [trainer.take(small.random_batch(run, seed)) for seed in range(3)]
        sums.append([[float(m[name]) for name in ("loss", "aux_loss", "grad_norm")] for m in taken])
    np.testing.assert_allclose(sums[1], sums[0], rtol=tolerance.F32_MODEL)
    np.testing.assert_allclose(sums[2], sums[0], rtol=tolerance.F32_MODEL)


@pytest.mark.slow
def test_evaluation_counts_the_experts_there_are():
    run = four_and_eight("topk")
    trainer, batch = small.Steps(run), small.random_batch(run, 1)
    with jax.set_mesh(trainer.mesh):
        sums = jax.jit(make_eval_step(trainer.spec, trainer.mesh))(trainer.state.params, trainer.put(batch))
    sums = jax.device_get(sums)
    arrays = {f"{name}_BS": batch[name] for name in ("segments", "positions")}
    routings = trainer.spec.merge(jax.device_get(trainer.state.params)).routings(batch["tokens"], **arrays)
    for layer, (routing, experts) in enumerate(zip(routings, (4, 8, 4, 8), strict=True)):
        ids = np.asarray(routing.ids_TK)
        assert sums["load"][layer].tolist() == [np.sum(ids == e) for e in range(8)]
        assert (
            np.diag(sums["together"][layer]).tolist() == sums["load"][layer].tolist() and ids.max() < experts
        )


def test_parameters_of_a_token_are_those_of_its_layers_experts():
    of = lambda *kinds: ModelSpec.from_config(run_with("topk", *kinds), small.VOCAB)  # noqa: E731
    expert, router_row = 3 * 16 * 8, 16  # SwiGLU of width 8, one column of the router
    total, active = of().count_parameters()
    assert of(None, "1:4").count_parameters() == (total - 4 * (expert + router_row), active - 4 * router_row)
    # Layer 0 chooses one expert instead of two.
    assert of("0:switch").count_parameters() == (total, active - expert)


def test_an_expert_axis_must_divide_every_layers_experts():
    run = dataclasses.replace(
        run_with("topk", None, "1:6"), mesh=dataclasses.replace(small.config().mesh, expert=4)
    )
    with pytest.raises(
        ConfigError, match=r"model.moe.layer_experts = 1:6: must be divisible by mesh.expert \(4\)"
    ):
        validate(run, 4)
