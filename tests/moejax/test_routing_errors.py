"""What routers refuse, and what the layer refuses of them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import moejax
from moejax.routing import make_router
from tests.moejax.routed import KEY, E, T, draw_logits


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("topkk", {}, "router = 'topkk': must be one of topk, .*; the nearest is topk"),
        ("topk", {"top_k": 9}, r"top_k = 9: must be between 1 and num_experts \(8\)"),
        ("switch", {"top_k": 2}, "top_k = 2: must be 1 for this router, or unset"),
        ("gshard", {"top_k": 1}, "top_k = 1: must be 2 for this router, or unset"),
        ("topk", {"jitter": 0.1}, "jitter = 0.1: router topk has no such option; its options are normalize"),
        (
            "switch",
            {"drop_by": "scores"},
            "drop_by = 'scores': must be one of position, score, random; .* score",
        ),
        ("sigmoid", {"expert_groups": 3}, r"expert_groups = 3: must divide num_experts \(8\)"),
        (
            "topk",
            {"expert_groups": 4, "limit_groups": 5},
            "limit_groups = 5: must be between 1 and expert_groups",
        ),
        (
            "topk",
            {"expert_groups": 4, "limit_groups": 1, "top_k": 3},
            "limit_groups = 1: leaves a token 2 experts",
        ),
        ("sigmoid", {"expert_groups": 8, "limit_groups": 1}, "limit_groups = 1: leaves a token 1 experts"),
        ("swipe", {"devices": 5}, "devices = 5: must divide num_experts"),
        ("topology", {"nodes": 8}, "nodes = 8: leaves a node 1 experts, fewer than top_k"),
        ("topology", {"nodes": 2, "groups": 3}, r"groups = 3: must be a multiple of nodes \(2\)"),
        ("rounded", {"max_experts": 1}, r"max_experts = 1: must be between top_k \(2\)"),
        ("one", {"expert": 8}, "expert = 8: must be between 0 and 7"),
    ],
    ids=str,
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_router(name, 16, E, rngs=nnx.Rngs(0), **options)


def test_groups_that_do_not_divide_are_refused_in_training_only():
    router = make_router("switch", E, E, groups=3, rngs=nnx.Rngs(0))
    x = jnp.asarray(draw_logits())
    with pytest.raises(ValueError, match="groups = 3: must divide the 64 tokens of a batch"):
        jax.eval_shape(lambda: router(x, key=KEY))
    assert jax.eval_shape(lambda: router(x)).ids_TK.shape == (T, 1)
    with pytest.raises(ValueError, match="token_ids_T = None: the hash router"):
        make_router("hash", E, E, rngs=nnx.Rngs(0))(x)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ids_TK", jnp.zeros((T,), jnp.int32), r"Routing.ids_TK: must be \[T, K\], got shape \(64,\)"),
        ("ids_TK", jnp.zeros((T, 2)), r"Routing.ids_TK: must be integer\[64, 2\], got float32\[64, 2\]"),
        (
            "weights_TK",
            jnp.zeros((T, 3)),
            r"Routing.weights_TK: must be floating\[64, 2\], got float32\[64, 3\]",
        ),
        ("scores_TE", jnp.zeros((T, 7)), r"Routing.scores_TE: must be floating\[64, 8\]"),
        ("valid_T", jnp.zeros((T,)), r"Routing.valid_T: must be bool\[64\], got float32\[64\]"),
    ],
    ids=str,
)
def test_a_routers_wrong_answer_is_named(field, value, message):
    class Wrong(moejax.TopK):
        def __call__(self, x_TD, **arguments):
            return dataclasses.replace(super().__call__(x_TD, **arguments), **{field: value})

    layer = moejax.MoE(E, 4, E, router=Wrong(E, E, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        layer(jnp.asarray(draw_logits()))


MOE = jnp.ones((T, 2)), jnp.ones((T, 2), jnp.int32), jnp.ones((T, 2)), lambda x_TD, *_: x_TD


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda F: F.route(draw_logits(), E + 1), rf"top_k = {E + 1}: must be between 1 and .* \({E}\)"),
        (lambda F: F.moe(*MOE, num_experts=E, axis=("a", "a")), "several different ones"),
    ],
)
def test_bad_arguments_of_functions_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(moejax.functional)
