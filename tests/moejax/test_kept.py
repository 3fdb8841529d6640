"""What backward keeps and what it forms again: the same gradients, and the exchanges that this costs."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import moejax
from moejax.cost import exchange_bytes
from moejax.wire import row_bytes
from tests.moejax.layer_under_load import make_mesh
from tests.moejax.whole_layer import D, T, assert_equals_oracle, draw, make_layer


def compiled(layout, **options) -> str:
    """The program of loss and gradients of one layer."""
    mesh = make_mesh(*layout)
    graphdef, params = nnx.split(make_layer(2, **options))

    def loss(params, x_TD):
        y_TD, stats = nnx.merge(graphdef, params)(x_TD)
        return jnp.sum(y_TD**2) + stats.aux_loss

    with jax.set_mesh(mesh):
        params = jax.device_put(params, moejax.mesh.state_shardings(params, mesh))
        x_TD = jax.device_put(jnp.ones((T, D)), moejax.mesh.token_sharding(mesh))
        step = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return step.lower(params, x_TD).compile().as_text()


@pytest.mark.landing
@pytest.mark.parametrize(("layout", "levels"), [((1, 1, 4), 1), ((1, 2, 2), 2)], ids=str)
def test_rows_are_sent_again_once_per_level(layout, levels):
    """Of each level: rows forth and back, their gradients, choices forth and weights' gradients back, the mask."""
    exchanges = {
        received: len(re.findall(r" all-to-all\(", compiled(layout, received=received)))
        for received in ("keep", "resend")
    }
    assert exchanges == {"keep": 7 * levels, "resend": 8 * levels}


@pytest.mark.landing
@pytest.mark.parametrize("layout", [(2, 1, 4), (1, 2, 2)], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"exchange": "all_gather"}, marks=pytest.mark.slow),
        pytest.param({"exchange": "ragged", "chunks": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_rows_sent_again_change_nothing(layout, options):
    assert_equals_oracle(make_layer(2, received="resend", **options), *draw(), mesh=make_mesh(*layout))


def test_gradients_are_not_summed_along_axes_of_one_device():
    groups = re.findall(r" all-reduce\(.*replica_groups=(\S+)", compiled((1, 1, 4)))
    assert groups
    assert not [group for group in groups if re.search(r"\{\d+\}", group)]


def test_bytes_of_compressed_rows():
    """With fp8 a row has its scale beside it, and comes back in bf16."""
    assert row_bytes(100, jnp.float32, "none") == (400, 400)
    assert row_bytes(100, jnp.float32, "bf16") == (200, 200)
    assert row_bytes(100, jnp.bfloat16, "fp8") == (104, 200)
    shapes = dict(tokens=10, bucket_rows=4, share=0.3, devices=3, row_bytes=(104, 200), top_k=2)
    assert exchange_bytes("all_to_all", **shapes) == (2 * 4 * (104 + 16), 2 * 4 * (200 + 2))
