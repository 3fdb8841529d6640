"""Experts of one's own: modules of one shape, lists of different ones, states that are no floats."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import moejax
from custom_ops import grouped_matmul, permute, unpermute
from tests import tolerance
from tests.moejax.layer_under_load import make_mesh
from tests.moejax.whole_layer import D, E, draw, layer_value_and_grads, make_layer


class Identity(nnx.Module):
    """Experts that return what they get, and have no width that could be split."""

    def __call__(self, x_TD, plan, weights_TK):
        return unpermute(permute(x_TD, plan), plan, weights_TK)


def test_experts_of_ones_own_are_not_summed_over_the_tensor_axis():
    x, _ = draw()
    layer = make_layer(2, experts=Identity())
    with jax.set_mesh(moejax.make_mesh(expert=2, tensor=2, data=2)):
        y = jax.jit(lambda layer, x: layer(x)[0])(layer, x)
    tolerance.assert_close(y, x, tolerance.F32, "y")


class Counted(nnx.Module):
    """Experts with a state that has no gradient: an integer for each, and a random key."""

    def __init__(self, rngs):
        self.w = nnx.Param(rngs.params.normal((E, D, D)) / D**0.5, axes=("experts", "embed", "embed"))
        self.power = nnx.Variable(jnp.arange(E, dtype=jnp.int32) % 3, axes=("experts",))
        self.key = nnx.Variable(jax.random.key(7), axes=())

    def __call__(self, x_TD, plan, weights_TK):
        noise_D = jax.random.normal(self.key[...], (D,))
        scale_EDD = 2.0 ** -self.power[...].astype(jnp.float32)[:, None, None] * self.w[...]
        y_ND = grouped_matmul(permute(x_TD, plan), scale_EDD * noise_D[None, None, :], plan.group_sizes_P)
        return unpermute(y_ND, plan, weights_TK)


@pytest.mark.landing
@pytest.mark.parametrize("shadow", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_experts_of_ones_own_with_integers_and_keys_go_through_the_loop_of_rounds(shadow):
    x, dy = draw(skew=6.0)
    experts = Counted(nnx.Rngs(3))
    y, stats, grads, dx = layer_value_and_grads(
        make_layer(2, experts=experts, buffer_factor=0.5, shadow=shadow), x, dy, mesh=make_mesh(1, 1, 4)
    )
    assert int(stats.rounds) > 1, "the case is meant to need further rounds"
    y_one, _, grads_one, dx_one = layer_value_and_grads(make_layer(2, experts=experts), x, dy)
    tolerance.assert_close(y, y_one, tolerance.F32, "y")
    tolerance.assert_close(dx, dx_one, tolerance.F32, "x")
    tolerance.assert_close(grads["experts"]["w"], grads_one["experts"]["w"], tolerance.F32, "w")


class Half(nnx.Module):
    """An expert without parameters."""

    def __call__(self, x_TD):
        return 0.5 * x_TD


class Direction(nnx.Module):
    """An expert that is NaN, as its gradients are, where a token is 0."""

    def __init__(self):
        self.scale_D = nnx.Param(jnp.linspace(0.5, 1.5, D), axes=("embed",))

    def __call__(self, x_TD):
        return self.scale_D[...][None, :] * x_TD / jnp.linalg.norm(x_TD, axis=1, keepdims=True)


def different_experts():
    rngs = nnx.Rngs(5)
    return [moejax.FeedForward(D, 8 + 4 * n, rngs=rngs) for n in range(E - 2)] + [Half(), Direction()]


@pytest.mark.landing
@pytest.mark.parametrize("data", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_list_of_different_experts(data):
    x, dy = draw()
    layer = make_layer(2, experts=different_experts())

    def dense(layer, x):
        routing = layer.router(x)
        y = jnp.zeros_like(x)
        for number, expert in enumerate(layer.experts.experts):
            chosen = routing.ids_TK == number
            y += jnp.sum(jnp.where(chosen, routing.weights_TK, 0), axis=1, keepdims=True) * expert(x)
        aux = 0.3 * moejax.losses.balance_loss(routing) + 0.1 * moejax.losses.z_loss(routing)
        return jnp.sum(y * dy) + aux, y

    graphdef, params = nnx.split(layer)
    (_, expected), (grads, dx) = jax.value_and_grad(
        lambda p, x: dense(nnx.merge(graphdef, p), x), argnums=(0, 1), has_aux=True
    )(params, x)
    y, _, actual, dx_layer = layer_value_and_grads(layer, x, dy, mesh=make_mesh(data, 1, 1))
    tolerance.assert_close(y, expected, tolerance.F32, "y")
    tolerance.assert_close(dx_layer, dx, tolerance.F32, "x")
    for ours, theirs in zip(
        jax.tree.leaves(actual["experts"]), jax.tree.leaves(nnx.to_pure_dict(grads)["experts"]), strict=True
    ):
        tolerance.assert_close(ours, theirs, tolerance.F32, "an expert's parameter")


def test_what_a_list_of_experts_cannot_do_is_said():
    x, _ = draw()
    with pytest.raises(ValueError, match=r"experts = \[Half.*: must be num_experts \(8\) modules, got 2"):
        make_layer(2, experts=[Half(), Half()])
    with pytest.raises(ValueError, match=r"experts = \[Half.*: must be different modules"):
        make_layer(2, experts=[Half()] * E)
    layer = make_layer(2, experts=[Half() for _ in range(E)])
    with (
        jax.set_mesh(moejax.make_mesh(expert=8)),
        pytest.raises(ValueError, match=r"experts = a list: .* cannot be split over mesh axis 'expert'"),
    ):
        layer(x)
    short = make_layer(2, experts=[lambda x_TD: x_TD[:, :3] for _ in range(E)])
    with pytest.raises(ValueError, match=r"experts\[0\] returned shape .*: must be that of its input"):
        short(x)


def with_axes(argument, axes):
    """A layer whose own `argument` has a parameter [E, D, 3] of these axes."""
    parameter = nnx.Param(jnp.ones((E, D, 3)), axes=axes)
    if argument == "router":
        own = moejax.TopK(D, E, rngs=nnx.Rngs(0))
        own.extra = parameter
    elif argument == "experts":
        own = Identity()
        own.extra = parameter
    else:
        own = [moejax.FeedForward(D, 8, rngs=nnx.Rngs(0)) for _ in range(E)]
        own[2].extra = parameter
    return moejax.MoE(D, 8, E, rngs=nnx.Rngs(1), **{argument.partition("[")[0]: own})


OWN = ("router", "experts", "experts[2]")


@pytest.mark.parametrize("argument", OWN)
@pytest.mark.parametrize(
    ("axes", "shown", "rule"),
    [
        (("foo",), "'foo'", "must be one of layers, .*"),
        (("embed", "expert"), "'expert'", "must be one of .*; the nearest is experts"),
        ((None, 3), "3", "must be one of layers, .*"),
        (None, "None", "must be a tuple of .*"),
        ("embed", "'embed'", "must be a tuple of .*"),
        ((None, "embed", None, None), "(None, 'embed', None, None)", "must be at most one for each dimension of .*"),
    ],
    ids=str,
)  # fmt: skip
def test_axes_that_are_none_are_refused_when_the_layer_is_built(argument, axes, shown, rule):
    with pytest.raises(ValueError, match=rf"^{re.escape(f'{argument}.extra.axes = {shown}')}: {rule}$"):
        with_axes(argument, axes)


@pytest.mark.parametrize("argument", OWN)
def test_a_dimension_that_is_never_split_is_none(argument):
    x, _ = draw()
    layer = with_axes(argument, (None, "embed", None))
    expected, _ = layer(x)
    with jax.set_mesh(moejax.make_mesh(tensor=2, devices=jax.devices()[:2])):
        y, _ = jax.jit(lambda layer, x: layer(x))(layer, x)
    tolerance.assert_close(y, expected, tolerance.F32, "y")
    specs = moejax.mesh.state_specs(nnx.state(layer), moejax.make_mesh(tensor=8))
    extra = [spec for path, spec in nnx.to_flat_state(specs) if path[-1] == "extra"]
    assert [tuple(spec.get_value()) for spec in extra] == [(None, None, None)]


class OfAnotherCall(nnx.Module):
    def __call__(self):
        return 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("router", r"^router = OfAnotherCall.*: must be one of topk, .*, or a module router\(x_TD, token_mask_T="),
        ("experts", r"^experts = OfAnotherCall: must be a module experts\(x_TD, plan, weights_TK\) -> y_TD$"),
        ("experts[0]", r"^experts\[0\] = OfAnotherCall.*: must be a module .* expert\(x_TD\) -> y_TD$"),
    ],
)  # fmt: skip
def test_modules_of_another_call_are_refused(argument, message):
    own = [OfAnotherCall()] * E if argument == "experts[0]" else OfAnotherCall()
    with pytest.raises(ValueError, match=message):
        make_layer(None, **{argument.partition("[")[0]: own})


def test_nested_inputs_are_refused_with_the_cure():
    x, _ = draw()
    with pytest.raises(ValueError, match=r"x = \{'text': .*: must be one array .* joined along their width"):
        make_layer(2)({"text": x, "image": x})
