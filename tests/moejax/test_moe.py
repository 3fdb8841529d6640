"""The MoE layer against the dense oracle, in value and in every gradient, on every layout."""

import contextlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax.levels import CAPACITY_FACTOR
from moejax.mesh import most_nodes
from moejax.order import after
from tests import tolerance
from tests.moejax import oracle
from tests.moejax.layer_under_load import make_mesh
from tests.moejax.whole_layer import (
    D,
    E,
    F,
    T,
    assert_equals_oracle,
    draw,
    layer_value_and_grads,
    make_layer,
    oracle_value_and_grads,
)

# (data, expert_node, expert)
LAYOUTS = [(2, 1, 1), (1, 1, 2), (2, 2, 2), (1, 1, 8)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_oracle_on_every_layout(layout):
    assert_equals_oracle(make_layer(2, buffer_factor=CAPACITY_FACTOR), *draw(), mesh=make_mesh(*layout))


@pytest.mark.parametrize(
    "options",
    [{"top_k": 1}, {"top_k": 3}, {"top_k": 8, "normalize": False}],
    ids=str,
)
def test_equals_oracle_without_mesh(options):
    assert_equals_oracle(make_layer(**options), *draw())


def test_weights_of_one_choice_are_not_normalised():
    # p / p = 1 would leave the router without a gradient from the model's loss.
    layer = make_layer(1)
    assert layer.router.normalize is False
    assert moejax.make_router("sigmoid", D, E, top_k=1, rngs=nnx.Rngs(0)).normalize is False
    _, _, grads, _ = layer_value_and_grads(layer, *draw())
    assert float(jnp.abs(grads["router"]["w_DE"]).max()) > 0.1


@pytest.mark.parametrize("mesh_size", [None, 4])
def test_one_expert_takes_all_and_others_are_empty(mesh_size):
    layer = make_layer(1)
    x, dy = draw()
    x = jnp.abs(x)
    layer.router.w_DE[...] = layer.router.w_DE[...].at[:, 5].set(1.0)
    mesh = mesh_size and moejax.make_mesh(expert=mesh_size, devices=jax.devices()[:mesh_size])
    stats = assert_equals_oracle(layer, x, dy, mesh=mesh)
    assert stats.load_E.tolist() == [0, 0, 0, 0, 0, T, 0, 0]


@pytest.mark.parametrize("mesh_size", [None, 4])
def test_skewed_load(mesh_size):
    mesh = mesh_size and moejax.make_mesh(expert=mesh_size, devices=jax.devices()[:mesh_size])
    stats = assert_equals_oracle(make_layer(2), *draw(skew=6.0), mesh=mesh)
    assert int(stats.load_E.max()) > 0.9 * T, "the case is meant to be unbalanced"


@pytest.mark.parametrize("mesh_size", [None, 8])
def test_masked_tokens_go_nowhere_even_if_nan(mesh_size):
    x, dy = draw()
    mask = jnp.arange(T) % 3 != 1
    mesh = mesh_size and moejax.make_mesh(expert=mesh_size, devices=jax.devices()[:mesh_size])
    layer = make_layer(2)
    poisoned = jnp.where(mask[:, None], x, jnp.nan)
    from_poisoned = layer_value_and_grads(layer, poisoned, dy, mask, mesh)
    assert_equals_oracle(layer, x, dy, mask=mask, mesh=mesh)
    jax.tree.map(
        np.testing.assert_array_equal, from_poisoned, layer_value_and_grads(layer, x, dy, mask, mesh)
    )
    y, stats = nnx.jit(lambda layer, x: layer(x, token_mask=jnp.zeros(T, bool)))(make_layer(2), x)
    assert not np.any(y) and float(stats.aux_loss) == 0 and not np.any(stats.load_E)


def test_three_devices_and_odd_sizes():
    mesh = moejax.make_mesh(expert=3, devices=jax.devices()[:3])
    layer = make_layer(3, num_experts=9)
    x, dy = draw()
    rows = T - 1  # 63 = 3 * 21
    y, stats, grads, _ = layer_value_and_grads(layer, x[:rows], dy[:rows], mesh=mesh)
    (_, (y_ref, *_)), expected = oracle_value_and_grads(layer, x[:rows], dy[:rows])
    tolerance.assert_close(y, y_ref, tolerance.F32)
    tolerance.assert_close(grads["experts"]["w_in"], expected[1], tolerance.F32)
    assert int(stats.load_E.sum()) == rows * 3


def test_float64_is_exact_to_f64():
    with jax.enable_x64(True):
        layer = make_layer(2, dtype=jnp.float64)
        state = jax.tree.map(lambda p: p.astype(jnp.float64), nnx.state(layer))
        nnx.update(layer, state)
        x, dy = (a.astype(jnp.float64) for a in draw())
        # The router itself computes in f32, so it is given to both sides.
        ids, weights = moejax.functional.route(x @ layer.router.w_DE[...], 2)
        weights = weights.astype(jnp.float64)

        graphdef, params = nnx.split(layer.experts)

        def ours(x, w_in, w_out):
            nnx.replace_by_pure_dict(params, {"w_in": w_in, "w_out": w_out})
            return moejax.functional.moe(x, ids, weights, nnx.merge(graphdef, params), num_experts=E)

        def dense(x, w_in, w_out):
            scale_TE = jnp.sum(jax.nn.one_hot(ids, E) * weights[:, :, None], axis=1)
            return sum(scale_TE[:, e, None] * oracle.ffn(x, w_in[e], w_out[e]) for e in range(E))

        args = (x, layer.experts.w_in[...], layer.experts.w_out[...])
        y, vjp = jax.vjp(ours, *args)
        y_ref, vjp_ref = jax.vjp(dense, *args)
        tolerance.assert_close(y, y_ref, tolerance.F64)
        for a, b in zip(vjp(dy), vjp_ref(dy), strict=True):
            tolerance.assert_close(a, b, tolerance.F64)


@pytest.mark.landing
@pytest.mark.parametrize("layout", [None, (1, 4), (2, 2)], ids=str)
def test_bf16_is_as_good_as_xla_on_the_dense_oracle(layout):
    """y and every gradient: at most twice as far from f64 as XLA's own bf16, on the same rounded numbers."""
    layer = make_layer(2, dtype=jnp.bfloat16, buffer_factor=1.15)
    experts = [weight[...].astype(jnp.bfloat16) for weight in (layer.experts.w_in, layer.experts.w_out)]
    layer.experts.w_in[...], layer.experts.w_out[...] = (weight.astype(jnp.float32) for weight in experts)
    x, dy = (array.astype(jnp.bfloat16) for array in draw())
    mesh = layout and moejax.make_mesh(expert_node=layout[0], expert=layout[1], devices=jax.devices()[:4])
    y, _, grads, dx = layer_value_and_grads(layer, x, dy, mesh=mesh)
    ours = dict(y=y, x=dx, router=grads["router"]["w_DE"], **grads["experts"])
    router = layer.router.w_DE[...]  # computes in f32, whatever its tokens are
    xla = dense_in_its_dtypes(layer, x, dy, router, *experts)
    with jax.enable_x64(True):
        wide = lambda array: jnp.asarray(np.asarray(array, np.float64))  # noqa: E731
        exact = dense_in_its_dtypes(layer, *map(wide, (x, dy, router, *experts)))
    for name, value in exact.items():
        bound = 2 * tolerance.relative_error(xla[name], value)
        assert 0 < bound < 0.1
        tolerance.assert_close(ours[name], value, bound, name)


def dense_in_its_dtypes(layer, x, dy, *weights):
    """y of the dense oracle, and the gradients of its weighted sum and losses by all that is given but dy."""

    def value(x, router, w_in, w_out):
        y, balance, z = oracle.moe(x, router, w_in, w_out, top_k=2)
        return jnp.sum(y * dy) + layer.balance_weight * balance + layer.z_weight * z, y

    (_, y), grads = jax.jit(jax.value_and_grad(value, (0, 1, 2, 3), has_aux=True))(x, *weights)
    return dict(y=y, **dict(zip(("x", "router", "w_in", "w_out"), grads, strict=True)))


def test_same_bits_every_time():
    mesh = moejax.make_mesh(data=2, expert=4)
    runs = [layer_value_and_grads(make_layer(2), *draw(), mesh=mesh) for _ in range(3)]
    for run in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, run, runs[0])


def test_out_of_range_choices_are_counted_and_go_nowhere():
    class Wild(moejax.TopK):
        def __call__(self, x_TD, **arguments):
            routing = super().__call__(x_TD, **arguments)
            ids = routing.ids_TK.at[0, 0].set(99).at[1, 1].set(-7).at[2, 0].set(-1)
            return moejax.Routing(
                ids, *[getattr(routing, f) for f in ("weights_TK", "logits_TE", "scores_TE", "valid_T")]
            )

    _, stats = make_layer(2, router=Wild(D, E, rngs=nnx.Rngs(0)))(draw()[0])
    assert int(stats.invalid) == 2 and int(stats.load_E.sum()) == 2 * T - 3


def test_expert_init_has_the_fan_in_of_one_expert():
    wide = moejax.Experts(64, 128, 256, rngs=nnx.Rngs(0))
    assert float(jnp.std(wide.w_in[...])) == pytest.approx(128**-0.5, rel=0.02)
    assert float(jnp.std(wide.w_out[...])) == pytest.approx(256**-0.5, rel=0.02)
    dense = moejax.FeedForward(128, 256, rngs=nnx.Rngs(0))
    assert float(jnp.std(dense.w_in[...])) == pytest.approx(float(jnp.std(wide.w_in[...])), rel=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, r"top_k = 9: must be between 1 and num_experts \(8\)"),
        ({"top_k": 1, "exchange": "ragd"}, "exchange = 'ragd': must be one of .*; the nearest is ragged"),
        ({"top_k": 1, "experts": "swigl"}, "experts = 'swigl': must be one of .*; the nearest is swiglu"),
        ({"top_k": 1, "capacity_factor": 2.0}, "capacity_factor = 2.0: .* the nearest .* is buffer_factor"),
        (
            {"top_k": 1, "router": "hash", "orthogonality_weight": 0.1},
            "orthogonality_weight = 0.1: needs a router with",
        ),
        ({"top_k": 1, "shared_hidden": 8}, "shared_hidden = 8: needs shared_experts of at least 1"),
        ({"top_k": 1, "shared_gate": True}, "shared_gate = True: needs shared_experts of at least 1"),
        (
            {"top_k": 3, "router": moejax.TopK(D, E, top_k=2, rngs=nnx.Rngs(0))},
            r"top_k = 3: must be the router's own \(2\) or None where router is a module",
        ),
        ({"top_k": 1, "shadow": 9}, r"shadow = 9: must be at most num_experts \(8\)"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_layer(**options)


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        (
            (3, 5),
            {},
            r"x = float32\[3, 5\]: must be \[..., d_model\], with the layer's d_model \(\d+\) last",
        ),
        (
            None,
            {"token_mask": np.ones(3, bool)},
            r"token_mask = bool\[3\]: must be \[4\], one for each token",
        ),
    ],
    ids=str,
)
def test_bad_arrays_are_named(shape, arguments, message):
    layer = make_layer(1)
    with pytest.raises(ValueError, match=message):
        layer(jnp.ones((4, layer.d_model) if shape is None else shape), **arguments)


def test_drop_drops_the_same_choices_on_every_layout():
    x, _ = draw(skew=6.0)
    outcomes = []
    for layout in ((1, 1, 1), (1, 1, 4)):
        # Through a gather over all devices no buffer can be full: what an expert may take is all that counts.
        layer = make_layer(2, overflow="drop", buffer_factor=1.5, exchange="all_gather")
        with jax.set_mesh(make_mesh(*layout)):
            y, stats = nnx.jit(lambda layer, x: layer(x))(layer, x)
        outcomes.append((np.asarray(y), int(stats.dropped), int(stats.over_capacity)))
    (y_one, dropped, over_capacity), (y_four, *counts) = outcomes
    assert 0 < dropped == over_capacity and counts == [dropped, over_capacity]
    tolerance.assert_close(y_four, y_one, tolerance.F32)


class PairRouter(nnx.Module):
    """Sends a token to two neighbours of the experts: the pair of the number in `token_ids_T`."""

    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None):
        ids_TK = 2 * token_ids_T[:, None] + jnp.arange(2, dtype=jnp.int32)[None]
        zeros_TE = jnp.zeros((x_TD.shape[0], E), jnp.float32)
        valid_T = jnp.ones(x_TD.shape[0], bool)
        return moejax.Routing(ids_TK, jnp.full(ids_TK.shape, 0.5), zeros_TE, zeros_TE + 1 / E, valid_T)


@pytest.mark.parametrize(("exchange", "at_sender"), [("all_to_all", 32), ("all_gather", 0), ("ragged", 0)])
def test_what_a_full_receiver_drops_is_counted_apart(exchange, at_sender):
    # A capacity is counted over all data groups, a buffer is of a device of one group: it can be full before its
    # experts are. With 2 groups of 2 devices of 64 tokens, an expert takes 256 * 2 / 8 = 64 choices, a device has room
    # for 64 * 2 = 128. Group 0 sends 64 choices to each of the experts 4 to 7: all admitted, 256 for one device. A
    # bucket, (1 - 6 / 28) * 64 rows in tiles of 8, holds 56 of the 64 rows that each sender has, of 2 choices each.
    # In group 1, 96 tokens want experts 4 and 5, which have had theirs, and 32 experts 0 and 1, which have room.
    pair = np.array([2, 3] * 64 + [2, 2, 2, 0] * 32, np.int32)
    layer = make_layer(None, router=PairRouter(), overflow="drop", buffer_factor=1.0, exchange=exchange)
    with jax.set_mesh(make_mesh(2, 1, 2)):
        _, stats = nnx.jit(lambda layer, x, ids: layer(x, token_ids=ids))(layer, jnp.ones((256, D)), pair)
    assert stats.load_E.tolist() == [32, 32, 0, 0, 160, 160, 64, 64]
    assert (int(stats.over_capacity), int(stats.at_sender)) == (2 * 96, at_sender)
    assert int(stats.at_receiver) == 256 - 128 - at_sender
    assert int(stats.dropped) == 2 * 96 + 256 - 128


def test_experts_that_the_mesh_does_not_divide_are_refused():
    with (
        jax.set_mesh(moejax.make_mesh(expert=8)),
        pytest.raises(ValueError, match=r"num_experts = 12: must be a multiple of mesh axis 'expert' \(8\)"),
    ):
        make_layer(1, num_experts=12)(draw()[0])


@pytest.mark.landing
@pytest.mark.parametrize(
    ("layout", "options"),
    [
        (None, {}),
        ((1, 1, 2), {}),
        pytest.param((1, 1, 2), {"buffer_factor": 0.5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_ensemble_of_layers_by_vmap(layout, options):
    x, dy = draw(skew=6.0)
    layers = [moejax.MoE(D, F, E, top_k=2, rngs=nnx.Rngs(seed), **options) for seed in range(2)]
    graphdef = nnx.graphdef(layers[0])

    def value(params, x):
        y, stats = nnx.merge(graphdef, params)(x)
        total = jnp.sum(y * dy)
        return after(total, total) + stats.aux_loss, stats.rounds

    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(nnx.state(layer) for layer in layers))
    grad = jax.grad(value, argnums=(0, 1), has_aux=True)
    together = jax.jit(jax.vmap(grad, in_axes=(0, None)))
    with jax.set_mesh(make_mesh(*layout)) if layout else contextlib.nullcontext():
        grads, rounds = together(params, x)
    assert len(set(rounds.tolist())) == (2 if options else 1), "each member takes its own number of rounds"
    for number, layer in enumerate(layers):
        alone, _ = jax.jit(grad)(nnx.state(layer), x)
        jax.tree.map(lambda a, b, n=number: tolerance.assert_close(a[n], b, tolerance.F32), grads, alone)


@pytest.mark.landing
def test_shadows_follow_the_running_load_and_stay_exact():
    # By this batch other experts would be copied; those of the estimate stay at home, whatever the batch says.
    mesh = make_mesh(1, 1, 4)
    layer = make_layer(2, shadow=2, buffer_factor=CAPACITY_FACTOR)
    x, dy = draw(skew=6.0)
    _, stats, *_ = layer_value_and_grads(layer, x, dy, mesh=mesh)
    assert int(stats.rounds) == 1 and not np.any(layer.demand_E[...])
    layer.follow(stats.load_E)
    np.testing.assert_allclose(layer.demand_E[...], 0.1 * np.asarray(stats.load_E), rtol=1e-6)
    coldest = jnp.argsort(stats.load_E)[:2]
    for wanted, needs_more in ((layer.demand_E[...], False), (jnp.zeros(E).at[coldest].set(1.0), True)):
        layer.demand_E[...] = wanted
        again = assert_equals_oracle(layer, x, dy, mesh=mesh)
        assert (int(again.rounds) > 1) == needs_more


@pytest.mark.landing
def test_rows_compressed_to_8_bits_through_the_ragged_exchange_and_its_loop():
    x, dy = draw()
    mesh = moejax.make_mesh(expert=8)
    layers = [make_layer(2, exchange="ragged", buffer_factor=0.5, wire=wire) for wire in ("none", "fp8")]
    (y, _, _, dx), (y8, _, _, dx8) = (layer_value_and_grads(layer, x, dy, mesh=mesh) for layer in layers)
    assert 0 < tolerance.relative_error(y8, y) <= 2**-4 and tolerance.relative_error(dx8, dx) <= 2**-4


def test_an_expert_axis_across_nodes_is_pointed_out():
    def gpus(count, per_node):
        return [
            types.SimpleNamespace(id=i, platform="gpu", slice_index=i // per_node, process_index=i)
            for i in range(count)
        ]

    grid = lambda *shape: np.asarray(gpus(16, 8)).reshape(shape)  # noqa: E731
    assert most_nodes(grid(1, 1, 16, 1)) == 2
    assert most_nodes(grid(1, 2, 8, 1)) == most_nodes(grid(2, 1, 8, 1)) == most_nodes(grid(4, 1, 2, 2)) == 1
    message = "expert = 16: the axis crosses 2 nodes.*up to 8 times.*expert_node=2, expert=8"
    with pytest.raises(UserWarning, match=message):  # as an error, so that no mesh of such devices is made
        moejax.make_mesh(expert=16, devices=gpus(16, 8))


def test_a_mesh_of_explicit_axes_is_refused_with_the_cure():
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Explicit,))
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"are Explicit: make the mesh by moejax\.make_mesh"),
    ):
        make_layer(2)(draw()[0])


def test_a_batch_may_have_more_elements_than_one_device_could_hold():
    layer = nnx.eval_shape(lambda: moejax.MoE(2**12, 8, 8, buffer_factor=1.0, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2**19, 2**12), jnp.float32)
    with jax.set_mesh(moejax.make_mesh(expert=8)):
        y, _ = nnx.eval_shape(lambda layer, x: layer(x), layer, x)
    assert y.shape == x.shape
    with pytest.raises(
        ValueError, match=r"x_TD = float32\[524288, 4096\]: must have fewer than 2\*\*31 elements"
    ):
        nnx.eval_shape(lambda layer, x: layer(x), layer, x)
