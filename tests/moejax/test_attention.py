"""Which attention runs, and that none builds a mask it does not need."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from moejax.attention import Attention, flash_obstacle

S = 24


def mask_sized(segments):
    """Whether the forward pass holds an array [2, 1, S, S] of bool before scores are computed."""
    attention = Attention(32, 4, rngs=nnx.Rngs(0))
    x, positions = jnp.zeros((2, S, 32)), jnp.zeros((2, S), jnp.int32)
    text = str(jax.make_jaxpr(lambda x: attention(x, segments, positions)[0])(x))
    return f"bool[2,1,{S},{S}]" in text


def test_only_packed_documents_need_a_mask():
    assert not mask_sized(None)
    assert mask_sized(jnp.ones((2, S), jnp.int32))


def on_gpu(monkeypatch, capability):
    """Act as on a GPU of this compute capability; returns how attention is called."""
    calls = []
    monkeypatch.setattr("moejax.attention._compute_capability", lambda: capability)

    def spy(q, k, v, **options):
        calls.append(options)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    return calls


def run(d_head, dtype=jnp.bfloat16, segments=None):
    attention = Attention(2 * d_head, 2, dtype=dtype, rngs=nnx.Rngs(0))
    attention(jnp.zeros((1, S, 2 * d_head), dtype), segments, jnp.zeros((1, S), jnp.int32))


@pytest.mark.parametrize(
    ("capability", "d_head", "dtype", "implementation"),
    [
        (9.0, 64, jnp.bfloat16, "cudnn"),
        pytest.param(9.0, 256, jnp.bfloat16, "cudnn", marks=pytest.mark.slow),
        (8.0, 128, jnp.bfloat16, "cudnn"),
        (8.0, 136, jnp.bfloat16, "xla"),
        pytest.param(9.0, 264, jnp.bfloat16, "xla", marks=pytest.mark.slow),
        (9.0, 20, jnp.bfloat16, "xla"),
        (9.0, 64, jnp.float32, "xla"),
        pytest.param(7.5, 64, jnp.bfloat16, "xla", marks=pytest.mark.slow),
        (None, 64, jnp.bfloat16, "xla"),
    ],
)
def test_the_flash_kernel_runs_where_it_can(monkeypatch, capability, d_head, dtype, implementation):
    calls = on_gpu(monkeypatch, capability)
    run(d_head, dtype)
    assert [call["implementation"] for call in calls] == [implementation]
    assert calls[0]["mask"] is None and calls[0]["is_causal"]


def test_the_flash_kernel_gets_a_mask_only_for_packed_documents(monkeypatch):
    calls = on_gpu(monkeypatch, 9.0)
    run(64, segments=jnp.ones((1, S), jnp.int32))
    assert calls[0]["implementation"] == "cudnn" and calls[0]["mask"].shape == (1, 1, S, S)


def test_a_fallback_says_why(monkeypatch, caplog):
    on_gpu(monkeypatch, 8.6)
    run(28)
    run(28)
    assert caplog.text.count("the width of a head must be a multiple of 8 and at most 128, it is 28") == 1
    odd = jax.ShapeDtypeStruct((1, 7, 2, 64), jnp.bfloat16)
    assert "even length, not 7" in flash_obstacle(odd, odd, has_mask=True, capability=9.0)
    assert flash_obstacle(odd, odd, has_mask=False, capability=9.0) is None
