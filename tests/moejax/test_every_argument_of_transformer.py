"""Every argument of the transformer, away from its default, against one that is written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from tests import tolerance
from tests.moejax import oracle
from tests.moejax.every_argument import assert_all_on, assert_same, value_and_grads

B, S, D, F, E = 4, 6, 8, 6, 4
MASK = np.ones((B, S), bool)
MASK[0, 3:] = False
VOCAB, HEADS, THETA = 13, 2, 50.0
LOADS = moejax.BatchLoad(
    jnp.asarray([[5.0, 9.0, 4.0, 2.0], [3.0, 8.0, 0.0, 0.0]]), jnp.full(2, 30.0), jnp.full(2, 2.0)
)
TRANSFORMER = dict(
    vocab_size=VOCAB,
    num_layers=3,
    d_model=D,
    num_heads=HEADS,
    d_hidden=10,
    num_kv_heads=1,
    activation="reglu",
    moe_layers=(1, 2),
    moe=dict(d_hidden=F, num_experts=E, router="noisy", balance_weight=0.3),
    moe_of_layer={2: dict(d_hidden=F, num_experts=2, top_k=1, balance_weight=0.2)},
    tie_embeddings=False,
    rope_theta=THETA,
    remat="full",
)
SEGMENTS = np.where(MASK, np.where(np.arange(S) < 2, 1, 2), 0)
CALL = dict(
    tokens_BS=np.random.default_rng(0).integers(0, VOCAB, (B, S)),
    segments_BS=SEGMENTS,
    positions_BS=np.broadcast_to(np.where(np.arange(S) < 2, np.arange(S), np.arange(S) - 2), (B, S)),
    key=jax.random.key(5),
    batch_load=LOADS,
    observe=True,
)


def test_every_argument_of_the_transformer_has_a_case():
    always = {"rngs": None, "dtype": None}  # bf16: `test_transformer_in_bf16`
    assert_all_on(moejax.Transformer.__init__, [always, TRANSFORMER])
    assert_all_on(moejax.Transformer.__call__, [CALL, {"cache": ()}])  # `test_cache_gives_...`


WIDTH = D // HEADS


def norm(x, module):
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * jnp.broadcast_to(module.scale[...], x.shape)


def rotate(x_BSHh, positions_BS):
    """Pairs (x_i, x_(i + h/2)) as complex numbers, turned by position * theta^(-2i/h)."""
    angle_BSf = positions_BS[..., None] * THETA ** (-np.arange(WIDTH // 2) / (WIDTH // 2))
    a, b = jnp.split(x_BSHh, 2, axis=-1)
    turned = (a + 1j * b) * np.exp(1j * angle_BSf)[:, :, None].astype(np.complex64)
    return jnp.concatenate([turned.real, turned.imag], axis=-1)


def attend(module, x, segments_BS, positions_BS):
    q, k, v = ((x @ w[...]).reshape(B, S, -1, WIDTH) for w in (module.w_q, module.w_k, module.w_v))
    q, k = rotate(norm(q, module.q_norm), positions_BS), rotate(norm(k, module.k_norm), positions_BS)
    k, v = (jnp.repeat(a, HEADS // a.shape[2], axis=2) for a in (k, v))
    scores = jnp.einsum("bshd,bthd->bhst", q, k) / WIDTH**0.5
    seen = (segments_BS[:, :, None] == segments_BS[:, None, :]) & np.tril(np.ones((S, S), bool))
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhst,bthd->bshd", weights, v).reshape(B, S, D) @ module.w_out[...]


def dense_transformer(model, tokens_BS, segments_BS, positions_BS, key, batch_load):
    """The logits, and the sum of all auxiliary losses."""
    graphdef, stacked = nnx.split(model.blocks)
    blocks = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[0], stacked))  # one period
    x, aux, keys = model.embedding[...][tokens_BS], 0.0, jax.random.split(key, model.num_layers)
    for layer, block in enumerate(blocks):
        x = x + attend(block.attention, norm(x, block.attention_norm), segments_BS, positions_BS)
        x_TD = norm(x, block.ffn_norm).reshape(-1, D)
        if isinstance(block.ffn, moejax.MoE):
            load = jax.tree.map(lambda leaf, n=layer - 1: leaf[n], batch_load)
            load = dataclasses.replace(load, counted_E=load.counted_E[: block.ffn.num_experts])
            mask_T = jnp.asarray(segments_BS > 0).reshape(-1)
            routing = block.ffn.router(x_TD, token_mask_T=mask_T, key=keys[layer])
            y_TD = oracle.layer(block.ffn, routing, x_TD, routing.ids_TK)
            aux += oracle.aux_loss(block.ffn, routing, batch_load=load)
        else:
            y_TD = oracle.ffn(x_TD, block.ffn.w_in[...], block.ffn.w_out[...], block.ffn.activation)
        x = x + y_TD.reshape(x.shape)
    return norm(x, model.final_norm) @ model.unembedding[...].T, aux


@pytest.mark.landing
def test_transformer_equals_one_that_is_written_out():
    model = moejax.Transformer(**TRANSFORMER, rngs=nnx.Rngs(1))
    call = {name: value for name, value in CALL.items() if name != "observe"}
    model.embedding[...] *= 50  # to unit size: of small numbers the first norm would magnify every rounding
    dy = jax.random.normal(jax.random.key(0), (B, S, VOCAB))

    def written_out(model, _):
        return *dense_transformer(model, **call), None

    def ours(model, _):
        hidden_BSD, stats, *_ = model(**CALL)
        return model.logits(hidden_BSD), stats.aux_loss.sum(), stats

    nothing = jnp.zeros(())
    (y, aux, _), expected = value_and_grads(written_out, model, nothing, dy)
    (logits, aux_loss, stats), actual = value_and_grads(ours, model, nothing, dy)
    tolerance.assert_close(logits, y, tolerance.F32_MODEL, "logits")
    tolerance.assert_close(aux_loss, aux, tolerance.F32_MODEL, "aux_loss")
    assert_same(actual, expected, tolerance.F32_MODEL)
    assert stats.choices.first_T.shape == (2, B * S)


def test_transformer_in_bf16():
    options = TRANSFORMER | {"moe_layers": (), "moe_of_layer": {}, "num_layers": 1, "remat": "none"}
    exact, rounded = (
        nnx.jit(lambda model, tokens: model(tokens)[0])(
            moejax.Transformer(**options, dtype=dtype, rngs=nnx.Rngs(1)), CALL["tokens_BS"]
        )
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert rounded.dtype == jnp.bfloat16
    assert 0 < tolerance.relative_error(rounded.astype(jnp.float32), exact) < 4 * tolerance.BF16
