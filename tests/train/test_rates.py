"""Rates: from known times follow known rates, and in every process those of the first."""

import jax
import jax.numpy as jnp
import pytest

import moejax
from train import rates

BANDWIDTH, LATENCY, MEMORY, FLOPS = 3e9, 7e-6, 20e9, 5e11
OVERHEAD = 4e-5  # of a call, beside what it is called for


def seconds(axis_size):
    """The clock of a machine with known rates, by what a call is given."""

    def of(function, array):
        assert function(array).shape == array.shape
        if array.ndim == 2:
            return OVERHEAD + 2 * array.shape[0] ** 3 / FLOPS
        if len(array.sharding.device_set) == 1:
            return OVERHEAD + 2 * array.nbytes / MEMORY
        assert array.sharding.shard_shape(array.shape) == (array.size // 8,)
        leaves = array.nbytes / 8 * (axis_size - 1) / axis_size
        return (axis_size - 1) * LATENCY + leaves / BANDWIDTH

    return of


@pytest.mark.parametrize(("axis", "size"), [("expert", 4), ("data", 2)])
def test_known_times_give_known_rates(axis, size, monkeypatch):
    monkeypatch.setattr(rates, "_seconds", seconds(size))
    monkeypatch.setattr(rates, "_WIDTHS", {"cpu": (8, 64)})
    measured = rates.measure_rates(moejax.make_mesh(data=2, expert=4), axis, jnp.float32)
    assert measured.link.bandwidth == pytest.approx(BANDWIDTH)
    assert measured.link.memory_bandwidth == pytest.approx(MEMORY)
    assert measured.flops == pytest.approx(FLOPS)
    # The small exchange is all latency but for its few bytes.
    assert LATENCY < measured.link.latency < 1.1 * LATENCY + 4096 / BANDWIDTH


def test_the_fastest_call_after_the_first_counts(monkeypatch):
    clock, calls = iter([0.0, 5.0, 10.0, 12.0, 20.0, 21.5, 30.0, 33.0, 40.0, 44.0]), []
    monkeypatch.setattr(rates.time, "perf_counter", lambda: next(clock))
    answer, best = rates.fastest(lambda: calls.append(None) or jnp.int32(len(calls)))
    assert (int(answer), best, len(calls)) == (6, 1.5, 6)


def test_every_process_has_the_rates_of_the_first(monkeypatch):
    first = rates.Rates(rates.Link(1.5, 2.5, 3.5), 4.5)
    told = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(rates.processes, "tell_all", lambda text, topic: told.append(text) or told[0])
    other = rates.Rates(rates.Link(9.0, 9.0, 9.0), 9.0)
    assert rates._of_first(first) == first and rates._of_first(other) == first
