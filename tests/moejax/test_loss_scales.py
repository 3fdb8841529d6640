"""Our losses beside those of other libraries, whose formulas are written out: the factors in docs/routers.md."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax import losses
from moejax.routing import Routing

T, E, K = 32, 8, 2


@pytest.fixture(scope="module")
def drawn():
    random = np.random.default_rng(0)
    logits = random.normal(size=(T, E)).astype(np.float32)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    ids = np.argsort(-scores, axis=1)[:, :K]
    weights = np.take_along_axis(scores, ids, axis=1)
    chance = random.random((T, E)).astype(np.float32)
    arrays = (ids, weights, logits, scores, np.ones(T, bool))
    routing = Routing(*map(jnp.asarray, arrays), chance_TE=jnp.asarray(chance))
    mask_TKE = np.eye(E)[ids]
    return routing, scores, mask_TKE, weights, chance


def test_scale_of_the_balance_loss(drawn):
    routing, scores, mask_TKE, *_ = drawn
    ours = float(losses.balance_loss(routing))
    prob_E, choices_E = scores.mean(axis=0), mask_TKE.sum(axis=(0, 1))
    peers = {
        # load_balancing_loss_func of transformers: the mean over tokens only, then the sum over choices and experts.
        "transformers": (K, E * (mask_TKE.mean(axis=0) * prob_E[None, :]).sum()),
        # switch_load_balancing_loss_func of Megatron-LM.
        "Megatron-LM": (1, E / (K * T**2) * (choices_E * scores.sum(axis=0)).sum()),
        # DeepSeek-V3, eq. 17-20, of one sequence.
        "DeepSeek-V3": (1, (E / (K * T) * choices_E * prob_E).sum()),
    }
    for name, (factor, theirs) in peers.items():
        assert theirs == pytest.approx(factor * ours, rel=1e-6), name
    # Of first choices only, as our router `gshard` counts them: the paper's algorithm 1, and FastMoE's gate.
    first = Routing(
        routing.ids_TK[:, :1],
        *(getattr(routing, f) for f in ("weights_TK", "logits_TE", "scores_TE", "valid_T")),
    )
    of_first, first_E = float(losses.balance_loss(first)), mask_TKE[:, 0].sum(axis=0) / T
    assert (first_E * prob_E).mean() == pytest.approx(of_first / E**2, rel=1e-6), "GShard's paper"
    assert (first_E * prob_E).mean() * E**2 == pytest.approx(of_first, rel=1e-6), "FastMoE on one device"
    sequences = float(losses.sequence_balance_loss(routing, sequence_length=T))
    assert sequences == pytest.approx(ours, rel=1e-6)


def test_scale_of_the_other_losses(drawn):
    routing, _, mask_TKE, weights, chance = drawn
    importance_E = (mask_TKE * weights[:, :, None]).sum(axis=(0, 1))
    for name, ours, x_E in (
        ("importance", losses.importance_loss(routing), importance_E),
        ("load", losses.load_loss(routing), chance.sum(axis=0)),
    ):
        tensor2tensor = x_E.var() / x_E.mean() ** 2  # tf.nn.moments: of the population
        fastmoe = x_E.var(ddof=1) / x_E.mean() ** 2  # torch.Tensor.var: of a sample
        assert tensor2tensor == pytest.approx(float(ours), rel=1e-5), name
        assert fastmoe == pytest.approx(E / (E - 1) * float(ours), rel=1e-5), name
    z_T = np.log(np.exp(np.asarray(routing.logits_TE)).sum(axis=1))
    assert (z_T**2).sum() / T == pytest.approx(float(losses.z_loss(routing)), rel=1e-6), (
        "ST-MoE, Megatron-LM, transformers"
    )
    w = np.random.default_rng(1).normal(size=(6, E)).astype(np.float32)
    simbal = np.abs(w.T @ w - np.eye(E)).sum()  # the L1 norm of the paper
    assert simbal == pytest.approx(E**2 * float(losses.orthogonality_loss(jnp.asarray(w))), rel=1e-5)
