"""Estimates that choose: what pays is found, what does not is left."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import moejax
from moejax.cost import Link, Rates, cheapest_exchange, shadows_that_pay, share_of_tokens

LINK = Link(bandwidth=50e9, latency=10e-6, memory_bandwidth=1e12)
RATES = Rates(LINK, 400e12)
SHAPES = dict(devices=4, row_bytes=8192, expert_bytes=2 * 3 * 4096 * 1024, row_flops=6 * 4096 * 1024.0)
EVEN, HOT = [1000.0] * 8, [1000.0] * 5 + [60_000.0] + [1000.0] * 2


def test_a_hot_expert_is_worth_its_copy_and_balanced_ones_are_not():
    number, seconds = shadows_that_pay([HOT], RATES, at_most=3, **SHAPES)
    assert number == 1 and len(seconds) == 4
    assert shadows_that_pay([HOT], RATES, at_most=0, **SHAPES) == (0, seconds[:1])
    assert shadows_that_pay([EVEN], RATES, at_most=3, **SHAPES)[0] == 0
    # By hand, one copy: the busiest device goes from 61,000 rows to 2,000, and 15,000 more are multiplied at home.
    saved = 4 * 59_000 * 8192 / 50e9 + 3 * 44_000 * SHAPES["row_flops"] / 400e12
    saved -= 2 * (2 * 0.75 * SHAPES["expert_bytes"] / 50e9 + 30e-6)
    assert seconds[0] - seconds[1] == pytest.approx(saved)


def test_the_number_for_all_layers_is_that_of_their_summed_seconds():
    of_each = [shadows_that_pay([load], RATES, at_most=3, **SHAPES)[1] for load in (EVEN, HOT, HOT)]
    number, seconds = shadows_that_pay([EVEN, HOT, HOT], RATES, at_most=3, **SHAPES)
    assert seconds == pytest.approx([sum(layers) for layers in zip(*of_each, strict=True)])
    assert number == 1, "the even layer's copy costs less than the others' save"


def test_a_change_must_save_more_than_the_margin():
    _, seconds = shadows_that_pay([HOT], RATES, at_most=3, **SHAPES)
    for now in (0, 3):
        share = 1 - seconds[1] / seconds[now]
        for margin, expected in ((0.99 * share, 1), (1.01 * share, now)):
            number, _ = shadows_that_pay([HOT], RATES, at_most=3, now=now, margin=margin, **SHAPES)
            assert number == expected
    assert shadows_that_pay([EVEN], RATES, at_most=3, now=2, **SHAPES)[0] == 0, "and back again"


def test_over_a_slow_wire_the_same_copies_cost_more_than_they_save_when_experts_are_large():
    large = SHAPES | {"expert_bytes": 10**12}
    assert shadows_that_pay([[9000.0] + [1000.0] * 7], RATES, at_most=2, **large)[0] == 0


@pytest.mark.parametrize(("top_k", "expected"), [(1, "all_to_all"), (64, "all_gather")])
def test_auto_takes_the_gather_where_a_token_goes_everywhere(top_k, expected):
    share = share_of_tokens(64, 8, top_k)
    name, seconds = cheapest_exchange(
        LINK,
        tokens=1024,
        bucket_rows=round(1.15 * share * 1024),
        share=share,
        devices=8,
        row_bytes=(4096, 4096),
        top_k=top_k,
    )
    assert name == expected == min(seconds, key=seconds.get)


def test_auto_goes_by_the_links_that_the_layer_is_told():
    # Buckets must be copied into, which only counts where memory is slow; a gather sends more.
    slow_memory = Link(bandwidth=50e9, latency=10e-6, memory_bandwidth=1e9)
    mesh = moejax.make_mesh(data=2, expert=4, devices=jax.devices()[:8])
    for links, asked in ((None, "all_to_all"), ({"expert": slow_memory}, "all_gather")):
        layer = moejax.MoE(8, 8, 8, top_k=1, exchange="auto", overflow="drop", links=links, rngs=nnx.Rngs(0))
        with jax.set_mesh(mesh):
            text = jax.jit(lambda x, layer=layer: layer(x)[0]).lower(jnp.ones((256, 8))).as_text()
        assert ("stablehlo.all_to_all" in text) == (asked == "all_to_all")
