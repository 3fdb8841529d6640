"""Every argument of the layer, away from its default, against the dense oracle.

A table of cases; an argument that no case turns on fails the test.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax.cost import Link
from moejax.routing import router_options
from tests import tolerance
from tests.moejax import oracle
from tests.moejax.every_argument import assert_all_on, assert_same, on_mesh, value_and_grads

B, S, D, F, E = 8, 8, 8, 6, 4
MASK = np.ones((B, S), bool)
MASK[0, 3] = MASK[1, 5:] = False
LOSSES = {"balance_weight": 0.3, "z_weight": 0.1, "importance_weight": 0.2}

# Name -> the mesh's axes, the constructor's arguments, those of the call, the tolerance.
CASES = {
    "on one device": (
        {},
        dict(
            router="noisy",
            router_bias=True,
            top_k=3,
            experts="geglu",
            expert_bias=True,
            shared_experts=2,
            shared_hidden=10,
            shared_gate=True,
            **LOSSES,
            load_weight=0.4,
            orthogonality_weight=0.5,
            balance_over="sequence",
            out_scale=0.5,
            keep_demand=True,
        ),
        dict(token_mask=MASK, key=jax.random.key(3), observe=True),
        tolerance.F32,
    ),
    "on a mesh": (
        dict(expert=2, tensor=2),
        dict(
            router="topk",
            top_k=2,
            scale=1.5,
            experts="clamped_swiglu",
            expert_bias=True,
            shared_experts=1,
            shared_gate=True,
            exchange="auto",
            links={"expert": Link(1e9, 1e-3, 1e10)},
            buffer_factor=0.5,
            chunks=2,
            shadow=1,
            **LOSSES,
        ),
        dict(
            token_mask=MASK,
            batch_load=moejax.BatchLoad(jnp.asarray([5.0, 9.0, 4.0, 2.0]), jnp.float32(20), jnp.float32(2)),
        ),
        tolerance.F32,
    ),
    "rows compressed, dropped, sent again": (
        dict(expert=4),
        dict(
            router="hash",
            overflow="drop",
            buffer_factor=0.8,
            exchange="all_gather",
            wire="bf16",
            received="resend",
            shared_experts=1,
        ),
        dict(token_ids=np.arange(B * S, dtype=np.int32).reshape(B, S) % 7),
        2 * tolerance.BF16,
    ),
    "in bf16": ({}, dict(dtype=jnp.bfloat16, experts="relu2"), {}, 2 * tolerance.BF16),
}


def make_layer(options):
    return moejax.MoE(D, F, E, **options, rngs=nnx.Rngs(1))


def test_every_argument_of_the_layer_has_a_case():
    always = dict.fromkeys(("d_model", "d_hidden", "num_experts", "rngs"))
    named = [
        {"router_options": {n for n in options if n in router_options(options.get("router", "topk"))} or ()}
        | options
        for _, options, _, _ in CASES.values()
    ]
    assert_all_on(moejax.MoE.__init__, [always, *named])
    assert_all_on(moejax.MoE.__call__, [{"x": None}, *(call for _, _, call, _ in CASES.values())])


def dense(layer, options, x, call):
    """y and the auxiliary loss by the oracle; the choices, and those of them that are not dropped."""
    flat = lambda a: None if a is None else jnp.asarray(a).reshape(-1)  # noqa: E731
    x_TD, mask_T = x.reshape(-1, D), flat(call.get("token_mask"))
    routing = layer.router(
        x_TD, token_mask_T=mask_T, token_ids_T=flat(call.get("token_ids")), key=call.get("key")
    )
    ids_TK = routing.ids_TK
    if options.get("overflow") == "drop":
        ids_TK = oracle.within_capacity(ids_TK, E, options["buffer_factor"])
    sequence = S if options.get("balance_over") == "sequence" else None
    aux = oracle.aux_loss(layer, routing, batch_load=call.get("batch_load"), sequence=sequence)
    return oracle.layer(layer, routing, x_TD, ids_TK).reshape(x.shape), aux, (routing.ids_TK, ids_TK)


@pytest.mark.landing
@pytest.mark.parametrize("case", CASES)
def test_layer_equals_the_oracle(case):
    axes, options, call, tol = CASES[case]
    layer = make_layer(options)
    for number, bias in enumerate((getattr(layer.experts, "b_in", None), layer.experts.b_out)):
        if bias is not None:
            bias[...] = jax.random.normal(jax.random.key(number), bias.shape)
    x, dy = 2 * jax.random.normal(jax.random.key(0), (2, B, S, D))
    (y, aux, (ids_TK, kept_TK)), expected = value_and_grads(
        lambda layer, x: dense(layer, options, x, call), layer, x, dy
    )

    def ours(layer, x):
        y, stats = layer(x, **call)
        return y, stats.aux_loss, stats

    with on_mesh(axes):
        (y_layer, aux_layer, stats), actual = value_and_grads(ours, layer, x, dy)
    tolerance.assert_close(y_layer, y, tol, "y")
    tolerance.assert_close(aux_layer, aux, tol, "aux_loss")
    assert_same(actual, expected, tol)
    ids_TK = np.asarray(ids_TK)
    assert stats.load_E.tolist() == np.bincount(ids_TK[ids_TK >= 0], minlength=E).tolist()
    assert int(stats.dropped) == np.sum(ids_TK != kept_TK)
    assert (int(stats.dropped) > 0) == (options.get("overflow") == "drop"), "the case is meant to drop"
    assert (int(stats.rounds) > 1) == (options.get("buffer_factor") == 0.5), (
        "the case is meant to take rounds"
    )
    if call.get("observe"):
        chosen_TE = (ids_TK[:, :, None] == np.arange(E)).any(axis=1).astype(int)
        np.testing.assert_array_equal(stats.choices.together_EE, chosen_TE.T @ chosen_TE)
        np.testing.assert_array_equal(stats.choices.first_T, ids_TK[:, 0])
    if options.get("keep_demand"):
        layer.follow(stats.load_E)
        np.testing.assert_allclose(layer.demand_E[...], 0.1 * np.asarray(stats.load_E), rtol=1e-6)
    if "out_scale" in options:
        plain = make_layer(options | {"out_scale": 1.0})
        for one, other in ((layer.experts, plain.experts), (layer.shared, plain.shared)):
            tolerance.assert_close(one.w_out[...], 0.5 * other.w_out[...], tolerance.F32, "w_out")
