"""What flax users do with any NNX module, done with every layer and router of the library.

Nothing is compiled but in the last tests: every idiom is traced by `nnx.eval_shape`.
"""

import copy
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import moejax
from custom_ops import make_plan
from moejax.cost import NVLINK
from moejax.delivery import OVERFLOWS
from moejax.expert_list import ExpertList
from moejax.levels import EXCHANGES
from moejax.routing import ROUTERS, make_router

B, S, T, D, F, E, K, V = 2, 4, 8, 8, 8, 4, 2, 11
X_BSD, X_TD = jnp.ones((B, S, D)), jnp.ones((T, D))
TOKENS_BS, TOKENS_T = jnp.ones((B, S), jnp.int32), jnp.ones(T, jnp.int32)
KEY = jax.random.key(0)


def different_experts(rngs):
    return [moejax.FeedForward(D, F + 4 * number, rngs=rngs) for number in range(E)]


def transformer(rngs):
    moe = {"d_hidden": F, "num_experts": E, "router": "sigmoid", "shadow": 1}
    sizes = {"vocab_size": V, "num_layers": 2, "d_model": D, "num_heads": 2, "d_hidden": F}
    return moejax.Transformer(
        **sizes, moe_layers=(1,), moe=moe, tie_embeddings=False, remat="full", rngs=rngs
    )


def apply_moe(layer):
    y, stats = layer(X_BSD, token_ids=TOKENS_BS, key=KEY)
    return jnp.sum(y) + stats.aux_loss


def apply_router(router):
    return jnp.sum(router(X_TD, token_ids_T=TOKENS_T, key=KEY).weights_TK)


def apply_experts(experts):
    return jnp.sum(experts(X_TD, make_plan(jnp.zeros((T, K), jnp.int32), E), jnp.ones((T, K))))


def apply_transformer(model):
    return jnp.sum(model(TOKENS_BS, key=KEY)[0])


def moe(**options):
    return lambda rngs: moejax.MoE(D, F, E, rngs=rngs, **options), apply_moe


EVERYTHING = {
    "router": "sigmoid",
    "shadow": 1,
    "shared_experts": 1,
    "shared_hidden": 12,
    "shared_gate": True,
    "experts": "clamped_swiglu",
    "expert_bias": True,
    "links": {"expert": NVLINK},
    "chunks": 2,
    "buffer_factor": 1.5,
    "wire": "bf16",
    "received": "resend",
    "dtype": jnp.bfloat16,
}
# Name -> (from rngs to the module, from the module to a number).
LAYERS = {
    "MoE": moe(),
    "MoE with everything": moe(**EVERYTHING),
    "MoE of different experts": (
        lambda rngs: moejax.MoE(D, F, E, experts=different_experts(rngs), rngs=rngs),
        apply_moe,
    ),
    **{name: (lambda rngs, name=name: make_router(name, D, E, rngs=rngs), apply_router) for name in ROUTERS},
    "Experts": (lambda rngs: moejax.Experts(E, D, F, rngs=rngs), apply_experts),
    "Experts with biases": (lambda rngs: moejax.Experts(E, D, F, bias=True, rngs=rngs), apply_experts),
    "ExpertList": (lambda rngs: ExpertList(different_experts(rngs), E), apply_experts),
    "Transformer": (transformer, apply_transformer),
    "Attention": (
        lambda rngs: moejax.Attention(D, 2, rngs=rngs),
        lambda layer: jnp.sum(layer(X_BSD, None, TOKENS_BS)[0]),
    ),
    "FeedForward": (lambda rngs: moejax.FeedForward(D, F, rngs=rngs), lambda layer: jnp.sum(layer(X_BSD))),
    "RMSNorm": (lambda rngs: moejax.RMSNorm(D), lambda layer: jnp.sum(layer(X_BSD))),
}
# These differ in their graphdef alone as long as there is no mesh.
EXCHANGING = {
    f"MoE {exchange} {overflow}": moe(exchange=exchange, overflow=overflow)
    for exchange, overflow in itertools.product(EXCHANGES, OVERFLOWS)
}


def abstract(make, seed=0):
    return nnx.eval_shape(lambda: make(nnx.Rngs(seed)))


def same(a, b):
    """Whether two layers are alike in structure and in every shape."""
    shapes = [
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), nnx.to_pure_dict(nnx.state(m))) for m in (a, b)
    ]
    return nnx.graphdef(a) == nnx.graphdef(b) and shapes[0] == shapes[1]


@pytest.mark.parametrize("name", LAYERS | EXCHANGING)
def test_a_graphdef_is_hashed_compared_and_static(name):
    make, apply = (LAYERS | EXCHANGING)[name]
    layer, again = abstract(make), abstract(make, seed=1)
    graphdef, state = nnx.split(layer)
    assert hash(graphdef) == hash(nnx.graphdef(again)) and graphdef == nnx.graphdef(again)
    assert hash(jax.tree.structure(layer)) == hash(jax.tree.structure(again))
    if name in LAYERS:
        static = jax.jit(lambda graphdef, state: apply(nnx.merge(graphdef, state)), static_argnums=0)
        assert static.eval_shape(graphdef, state).shape == ()


def test_layers_that_deliver_differently_have_different_graphdefs():
    graphdefs = {nnx.graphdef(abstract(make)) for make, _ in EXCHANGING.values()}
    assert len(graphdefs) == len(EXCHANGING)


@pytest.mark.parametrize("name", LAYERS)
def test_copies_are_the_same_layer(name):
    layer = abstract(LAYERS[name][0])
    shape = jax.eval_shape(lambda: LAYERS[name][0](nnx.Rngs(0)))  # modules are trees to jax itself
    copies = [shape, nnx.merge(*nnx.split(layer)), nnx.clone(layer), copy.deepcopy(layer)]
    copies += [pickle.loads(pickle.dumps(layer)), nnx.List([layer])[0], nnx.Sequential(layer).layers[0]]
    for number, other in enumerate(copies):
        assert same(layer, other), number
    nnx.update(layer, nnx.state(copies[1]))
    assert len(list(nnx.iter_modules(layer))) >= 1 and repr(layer)
    layer.eval(), layer.train()


def stack(make, count=3):
    """Independently drawn copies, as the NNX guides stack layers."""
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(KEY, count))


def over_stack(make, apply):
    layers = stack(make)
    results = nnx.vmap(apply)(layers)
    # `nnx.scan` over layers as one deep layer.
    total, _ = nnx.scan(
        lambda total, layer: (total + apply(layer), None), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)
    )(jnp.float32(0), layers)
    return results, total


def trace_all_idioms(make, apply):
    """Trace every transformation of the layer, those of parameters only where it has some."""
    has_parameters = bool(jax.tree.leaves(nnx.state(abstract(make), nnx.Param)))

    def all_idioms():
        layer = make(nnx.Rngs(0))
        called = jax.jit(apply)(layer), nnx.jit(nnx.remat(apply))(layer)
        if not has_parameters:
            return called
        return *called, nnx.jit(nnx.value_and_grad(apply))(layer), over_stack(make, apply)

    jax.eval_shape(all_idioms)


@pytest.mark.parametrize("name", LAYERS)
def test_transformations_take_every_layer(name):
    trace_all_idioms(*LAYERS[name])


# Of flax's other flags, `flax_pytree_module` is read when a class is made, and with `flax_hijax_variable` flax's own
# layers cannot be differentiated (0.12.8).
@pytest.mark.parametrize("flag", [nnx.set_graph_mode, nnx.set_graph_updates])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in ("MoE with everything", "Transformer") else pytest.mark.landing
        )
        for name in LAYERS
    ],
)
def test_transformations_with_modules_as_trees(flag, name):
    with flag(False):
        trace_all_idioms(*LAYERS[name])


def test_an_optimizer_moves_parameters_and_the_layers_own_states_follow():
    layer = moejax.MoE(D, F, E, router="sigmoid", shadow=1, shared_experts=1, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(layer, optimizer, x):
        def loss(layer):
            y, stats = layer(x)
            return jnp.mean(y * y) + stats.aux_loss, stats.load_E

        grads, load_E = nnx.grad(loss, has_aux=True)(layer)
        optimizer.update(layer, grads)
        layer.router.balance(load_E)
        layer.follow(load_E)
        return load_E

    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
    load_E = step(layer, optimizer, jax.random.normal(KEY, (T, D)))
    after = nnx.to_pure_dict(nnx.state(layer))
    same = jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), before, after)
    assert not any(jax.tree.leaves(same)), same  # every parameter and both states have moved
    np.testing.assert_allclose(layer.demand_E[...], 0.1 * load_E, rtol=1e-6)


def test_in_a_sequential_the_statistics_are_taken_off_by_a_function():
    # `nnx.Sequential` hands a tuple on as several arguments.
    layer, norm = moejax.MoE(D, F, E, rngs=nnx.Rngs(0)), moejax.RMSNorm(D)
    _, stats = jax.eval_shape(nnx.Sequential(norm, layer), X_TD)
    y = jax.eval_shape(nnx.Sequential(layer, lambda y, stats: y, norm), X_TD)
    assert y.shape == X_TD.shape and stats.load_E.shape == (E,)
