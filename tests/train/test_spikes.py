"""A jump of the gradient norm is said once it is one."""

import math

from train.spikes import NEEDED, SpikeWatch


def warnings(norms, factor=10.0):
    watch = SpikeWatch(factor)
    return [step for step, norm in enumerate(norms, 1) if watch(step, norm)]


def test_a_jump_is_reported_and_a_slow_rise_is_not():
    assert warnings([1.0] * 30 + [10.1] + [1.0] * 5 + [9.9]) == [31]
    assert warnings([1.02**step for step in range(200)]) == []
    watch = SpikeWatch(10)
    for step in range(NEEDED):
        assert watch(step, 0.5) is None
    assert watch(40, 50.0).startswith("step 40: gradient norm 50, 100 times the median of the last 20 steps")


def test_what_is_left_out():
    assert warnings([1.0] * (NEEDED - 1) + [1e9]) == [], "too few steps to know"
    assert warnings([1.0] * 50 + [1e9], factor=0) == [], "switched off"
    # What is not finite is reported as such elsewhere, and does not count among the usual.
    assert warnings([1.0] * 30 + [math.nan, math.inf] * 30 + [11.0]) == [91]
