"""Estimates that choose: what pays is found, what does not is left."""

import pytest

from moejax.cost import Link, Rates, cheapest_exchange, shadows_that_pay, share_of_tokens

LINK = Link(bandwidth=50e9, latency=10e-6, memory_bandwidth=1e12)
SHAPES = dict(devices=4, row_bytes=8192, expert_bytes=2 * 3 * 4096 * 1024, row_flops=6 * 4096 * 1024.0)


def test_a_hot_expert_is_worth_its_copy_and_balanced_ones_are_not():
    rates = Rates(LINK, 400e12)
    hot = [1000.0] * 8
    hot[5] = 60_000.0
    assert shadows_that_pay(hot, rates, at_most=3, **SHAPES)[0] == 1
    assert shadows_that_pay(hot, rates, at_most=0, **SHAPES) == (0, 0.0)
    assert shadows_that_pay([1000.0] * 8, rates, at_most=3, **SHAPES) == (0, 0.0)
    # By hand, one copy: the busiest device goes from 61,000 rows to 2,000, and 15,000 more are multiplied at home.
    seconds = 4 * 59_000 * 8192 / 50e9 + 3 * 44_000 * SHAPES["row_flops"] / 400e12
    seconds -= 2 * (2 * 0.75 * SHAPES["expert_bytes"] / 50e9 + 30e-6)
    assert shadows_that_pay(hot, rates, at_most=3, **SHAPES)[1] == pytest.approx(seconds)


def test_over_a_slow_wire_the_same_copies_cost_more_than_they_save_when_experts_are_large():
    large = SHAPES | {"expert_bytes": 10**12}
    assert shadows_that_pay([9000.0] + [1000.0] * 7, Rates(LINK, 400e12), at_most=2, **large) == (0, 0.0)


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
