"""The transformer: the same numbers on every layout, remat policy and way of running it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax.transformer import REMAT_POLICIES
from tests import tolerance

VOCAB, B, S = 31, 8, 12
SIZES = dict(vocab_size=VOCAB, num_layers=4, d_model=32, num_heads=4, d_hidden=48)
MOE = dict(d_hidden=16, num_experts=8, top_k=2, balance_weight=0.1)


def make(**options):
    return moejax.Transformer(**(SIZES | {"moe": MOE, "moe_layers": (1, 3)} | options), rngs=nnx.Rngs(0))


@nnx.jit
def forward(model, tokens, **arguments):
    return model(tokens, **arguments)


def draw(seed=0):
    key = jax.random.key(seed)
    tokens = jax.random.randint(key, (B, S), 0, VOCAB)
    segments = jnp.broadcast_to(jnp.where(jnp.arange(S) < 5, 1, 2), (B, S)).at[0, -2:].set(0)
    positions = jnp.broadcast_to(jnp.where(jnp.arange(S) < 5, jnp.arange(S), jnp.arange(S) - 5), (B, S))
    targets = jnp.where(segments > 0, jnp.roll(tokens, -1, axis=1), -1)
    return tokens, segments, positions, targets


def loss_and_grads(model, batch, mesh=None, chunk=1000):
    graphdef, params = nnx.split(model)

    def loss(params, tokens, segments, positions, targets):
        model = nnx.merge(graphdef, params)
        hidden, stats, *_ = model(tokens, segments_BS=segments, positions_BS=positions)
        aux = 0.0 if stats is None else stats.aux_loss.sum()
        return model.loss(hidden, targets, chunk=chunk) / (targets >= 0).sum() + aux

    run = jax.jit(jax.value_and_grad(loss))
    if mesh is None:
        value, grads = run(params, *batch)
    else:
        with jax.set_mesh(mesh):
            params = jax.device_put(params, moejax.mesh.state_shardings(params, mesh))
            value, grads = run(params, *jax.device_put(batch, moejax.mesh.token_sharding(mesh)))
    return value, nnx.to_pure_dict(grads)


def assert_same(actual, expected, tol):
    tolerance.assert_close(actual[0], expected[0], tol, "loss")
    paths = jax.tree_util.tree_leaves_with_path(expected[1])
    for (path, b), a in zip(paths, jax.tree.leaves(actual[1]), strict=True):
        tolerance.assert_close(a, b, tol, jax.tree_util.keystr(path))


@pytest.mark.landing
@pytest.mark.parametrize("layout", [pytest.param((2, 1), marks=pytest.mark.slow), (2, 4)], ids=str)
def test_layouts_agree(layout):
    data, expert = layout
    mesh = moejax.make_mesh(data=data, expert=expert, devices=jax.devices()[: data * expert])
    assert_same(loss_and_grads(make(), draw(), mesh), loss_and_grads(make(), draw()), tolerance.F32_MODEL)


@pytest.mark.landing
# "full": against a transformer that is written out, in `test_every_argument_of_transformer.py`.
@pytest.mark.parametrize("remat", sorted(set(REMAT_POLICIES) - {"none", "full"}))
def test_remat_changes_nothing(remat):
    assert_same(
        loss_and_grads(make(remat=remat), draw()), loss_and_grads(make(), draw()), tolerance.F32_MODEL
    )


@pytest.mark.parametrize("remat", sorted(REMAT_POLICIES))
def test_backward_never_chooses_experts_again(remat):
    model = make(remat=remat, moe_layers=range(4))
    graphdef, params = nnx.split(model)
    tokens, *_ = draw()

    def loss(params):
        hidden, *_ = nnx.merge(graphdef, params)(tokens)
        return hidden.sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(params))
    assert text.count("top_k[") == 1, "one choice, in the forward scan"


def test_chunked_loss_equals_whole_logits():
    model, batch = make(), draw()
    hidden, *_ = forward(model, batch[0], segments_BS=batch[1], positions_BS=batch[2])
    logits, targets = model.logits(hidden), batch[3]
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], -1)[
        ..., 0
    ]
    expected = -jnp.sum(jnp.where(targets >= 0, log_probs, 0))
    for chunk in (1000, 7):
        tolerance.assert_close(
            model.loss(hidden, targets, chunk=chunk), expected, tolerance.F32, f"chunk {chunk}"
        )
    assert_same(loss_and_grads(make(), batch, chunk=7), loss_and_grads(make(), batch), tolerance.F32_MODEL)


def test_chunked_loss_gradient_equals_plain_differentiation():
    x, w = jax.random.normal(jax.random.key(0), (20, 8)), jax.random.normal(jax.random.key(1), (VOCAB, 8))
    targets = jnp.arange(20) - 3

    def plain(x, w):
        log_probs = jax.nn.log_softmax(x @ w.T)[jnp.arange(20), jnp.maximum(targets, 0)]
        return -jnp.sum(jnp.where(targets >= 0, log_probs, 0))

    ours = jax.grad(lambda x, w: moejax.losses.cross_entropy(x, w, targets, 6), argnums=(0, 1))(x, w)
    for a, b in zip(ours, jax.grad(plain, argnums=(0, 1))(x, w), strict=True):
        tolerance.assert_close(a, b, tolerance.F32)


def test_logits_never_stand_whole_in_memory():
    vocab, tokens, chunk = 5000, 4096, 256

    def loss(x, w, targets):
        return moejax.losses.cross_entropy(x, w, targets, chunk)

    shapes = [
        jax.ShapeDtypeStruct(s, d) for s, d in (((tokens, 16), jnp.float32), ((vocab, 16), jnp.float32))
    ]
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(
        *shapes, jax.ShapeDtypeStruct((tokens,), jnp.int32)
    )
    temporary = compiled.compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * chunk * vocab * 4 < tokens * vocab * 4 / 3


def test_documents_do_not_see_each_other():
    model, (tokens, segments, positions, _) = make(), draw()
    hidden, *_ = forward(model, tokens, segments_BS=segments, positions_BS=positions)
    other = tokens.at[:, :5].set((tokens[:, :5] + 1) % VOCAB)
    changed, *_ = forward(model, other, segments_BS=segments, positions_BS=positions)
    # Not to the bit: other tokens change which rows an expert multiplies together.
    tolerance.assert_close(changed[:, 5:], hidden[:, 5:], tolerance.F32_MODEL)
    assert np.abs(hidden[:, :5] - changed[:, :5]).max() > 0.1
    alone, *_ = forward(model, tokens[1:, 5:])
    tolerance.assert_close(hidden[1:, 5:], alone, tolerance.F32_MODEL, "the second document by itself")


def test_the_future_is_not_seen():
    model, (tokens, *_) = make(), draw()
    hidden, *_ = forward(model, tokens)
    changed, *_ = forward(model, tokens.at[:, -1].set((tokens[:, -1] + 1) % VOCAB))
    tolerance.assert_close(changed[:, :-1], hidden[:, :-1], tolerance.F32_MODEL)


@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 2, "tie_embeddings": False, "moe_layers": (0, 1)}], ids=str
)
def test_cache_gives_what_the_whole_sequence_gives(options):
    model, (tokens, *_) = make(**options), draw()
    hidden, *_ = forward(model, tokens)
    cache = model.init_cache(B, S)
    first, *_, cache = forward(model, tokens[:, :4], cache=cache)
    pieces = [first]
    for position in range(4, S):
        positions = jnp.full((B, 1), position, jnp.int32)
        piece, *_, cache = forward(
            model, tokens[:, position : position + 1], positions_BS=positions, cache=cache
        )
        pieces.append(piece)
    tolerance.assert_close(jnp.concatenate(pieces, axis=1), hidden, tolerance.F32_MODEL)


def test_cache_window_rolls_over():
    model = make(num_layers=1, moe_layers=())
    tokens = draw()[0][:1]
    window, cache = 5, model.init_cache(1, 5)
    for position in range(S):
        positions = jnp.full((1, 1), position, jnp.int32)
        last, *_, cache = forward(
            model, tokens[:, position : position + 1], positions_BS=positions, cache=cache
        )
    # One layer: only the last `window` tokens matter, and only relative positions do.
    expected, *_ = forward(model, tokens[:, -window:])
    tolerance.assert_close(last[:, -1], expected[:, -1], tolerance.F32_MODEL)


@pytest.mark.parametrize("moe_layers", [(), (0,), (1, 3), (0, 1, 2, 3)], ids=str)
def test_any_subset_of_layers(moe_layers):
    model = make(moe_layers=moe_layers)
    _, stats, finite_L, _ = forward(model, draw()[0])
    assert finite_L.shape == (4,) and bool(finite_L.all())
    if moe_layers:
        assert stats.load_E.shape == (len(moe_layers), 8) and (stats.load_E.sum(axis=-1) == B * S * 2).all()
    else:
        assert stats is None


def test_the_first_layer_with_nan_is_seen():
    model = make(moe_layers=range(4))
    model.blocks[0].ffn.experts.w_out[...] = model.blocks[0].ffn.experts.w_out[...].at[2].set(jnp.nan)
    _, _, finite_L, _ = forward(model, draw()[0])
    assert finite_L.tolist() == [True, True, False, False]


def test_program_does_not_grow_with_depth():
    def size(num_layers):
        model = make(num_layers=num_layers, moe_layers=range(1, num_layers, 2))
        return len(str(jax.make_jaxpr(lambda tokens: model(tokens)[0])(draw()[0])))

    assert size(16) < 1.1 * size(4)


def test_initial_loss_is_that_of_guessing():
    value, _ = loss_and_grads(make(moe=MOE | {"balance_weight": 0.0, "z_weight": 0.0}), draw())
    assert float(value) == pytest.approx(np.log(VOCAB), rel=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "d_model = 32: must give each of num_heads"),
        ({"num_kv_heads": 3}, "num_kv_heads = 3: must divide num_heads"),
        ({"moe_layers": (4,)}, r"moe_layers = \(4,\): must be numbers from 0 to 3"),
        ({"moe": {"d_hidden": 8}}, r"moe = \{'d_hidden': 8\}: must have 'num_experts'"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
