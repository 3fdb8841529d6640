"""Optimizers and schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax.contrib
import pytest

from tests import tolerance
from tests.train import small
from train.config import OptimizerConfig
from train.optimizer import make_optimizer, make_schedule


def test_cosine_warms_up_and_ends_at_the_final_fraction():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    schedule = make_schedule(config, 100)
    values = np.asarray([schedule(step) for step in range(100)])
    np.testing.assert_allclose(values[:10], 0.2 * np.arange(1, 11), rtol=tolerance.F32)
    assert np.all(np.diff(values[10:]) <= 0) and values[55] == pytest.approx(1.1, rel=0.01)
    assert float(schedule(100)) == pytest.approx(0.2)


def test_wsd_is_stable_then_linear():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=10, schedule="wsd", decay_fraction=0.2, final_fraction=0.0
    )
    values = np.asarray([make_schedule(config, 100)(step) for step in range(101)])
    assert np.all(values[10:81] == 1) and values[90] == pytest.approx(0.5) and values[100] == 0


@pytest.mark.parametrize("name", ["cosine", "wsd", "constant"])
def test_a_warm_up_longer_than_the_run_is_legal(name):
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=1000, schedule=name)
    values = [float(make_schedule(config, 10)(step)) for step in range(10)]
    np.testing.assert_allclose(values, np.arange(1, 11) / 1000, rtol=tolerance.F32)


def random_like(tree, seed):
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    return jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), tree)


@pytest.mark.landing
def test_muon_orthogonalises_every_expert_matrix_by_itself():
    run = small.config(
        optimizer=OptimizerConfig(name="muon", weight_decay=0.0, clip_norm=1e9, warmup_steps=0)
    )
    trainer = small.Steps(run)
    params = trainer.state.params
    grads = random_like(params, 0)
    optimizer = make_optimizer(run.optimizer, run.steps, trainer.spec)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    plain = optax.contrib.muon(make_schedule(run.optimizer, run.steps), consistent_rms=0.2)

    def alone(matrix):
        return plain.update({"w": matrix}, plain.init({"w": matrix}), {"w": matrix})[0]["w"]

    experts, attention = (tree["blocks"][0] for tree in (updates, grads)), grads["blocks"][0]["attention"]
    ours, grad = (block["ffn"]["experts"] for block in experts)
    for layer, expert in ((0, 3), (1, 7)):
        for part in (0, 1):
            expected = alone(grad["w_in"][layer, expert, :, part])
            tolerance.assert_close(ours["w_in"][layer, expert, :, part], expected, tolerance.F32_MODEL)
        expected = alone(grad["w_out"][layer, expert])
        tolerance.assert_close(ours["w_out"][layer, expert], expected, tolerance.F32_MODEL)
    expected = alone(attention["w_q"][1])
    tolerance.assert_close(updates["blocks"][0]["attention"]["w_q"][1], expected, tolerance.F32_MODEL)
    singular = jnp.linalg.svd(updates["blocks"][0]["attention"]["w_q"][1], compute_uv=False)
    assert float(singular.max() / singular.min()) < 3, "all directions move alike"


def test_muon_leaves_embeddings_routers_and_norms_to_adam():
    run = small.config(optimizer=OptimizerConfig(name="muon"))
    trainer = small.Steps(run)
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trainer.state.opt_state)
    ]
    second_moments = [path for path in paths if ".nu" in path]
    assert {name for name in ("embedding", "router", "norm") if any(name in p for p in second_moments)} == {
        "embedding",
        "router",
        "norm",
    }
    assert not any("experts" in path or "w_q" in path for path in second_moments)


@pytest.mark.landing
def test_norms_do_not_decay_and_matrices_do():
    run = small.config(optimizer=OptimizerConfig(weight_decay=0.5, learning_rate=0.1, warmup_steps=0))
    trainer = small.Steps(run)
    params = trainer.state.params
    optimizer = make_optimizer(run.optimizer, run.steps, trainer.spec)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert not np.any(updates["final_norm"]["scale"])
    assert not np.any(updates["blocks"][0]["ffn_norm"]["scale"]), "stacked over layers, it is still no matrix"
    assert np.any(updates["blocks"][0]["ffn"]["experts"]["w_out"])


def test_clipping_is_by_the_global_norm():
    run = small.config(optimizer=OptimizerConfig(clip_norm=1.0))
    trainer = small.Steps(run)
    grads = random_like(trainer.state.params, 0)
    small_optimizer = make_optimizer(run.optimizer, run.steps, trainer.spec)
    scaled = jax.tree.map(lambda g: 1000.0 * g, grads)
    first, second = (
        small_optimizer.update(g, small_optimizer.init(trainer.state.params), trainer.state.params)[0]
        for g in (grads, scaled)
    )
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        tolerance.assert_close(a, b, tolerance.F32_MODEL)
