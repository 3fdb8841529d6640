"""Rates: from known times follow known rates, and in every process those of the first."""

import jax
import jax.numpy as jnp
import pytest

import moejax
from train import rates

BANDWIDTH, LATENCY, MEMORY, FLOPS = 3e9, 7e-6, 20e9, 5e11
OVERHEAD = 4e-5  # of a call, beside what it is called for


def seconds(axis_size):
    """The clock of a machine with known rates, by what a device has to do in a call."""

    def of(function, array):
        program = function.lower(array).as_text()
        assert array.sharding.shard_shape(array.shape) == (array.size // 8,), "every device has its part"
        part = array.nbytes / 8
        if "all_to_all" in program:
            leaves = part * (axis_size - 1) / axis_size
            return OVERHEAD + (axis_size - 1) * LATENCY + leaves / BANDWIDTH
        if "dot_general" in program:
            return OVERHEAD + 2 * (array.size / 8) ** 1.5 / FLOPS
        return OVERHEAD + 2 * part / MEMORY

    return of


@pytest.mark.parametrize(("axis", "size"), [("expert", 4), ("data", 2)])
def test_known_times_give_known_rates(axis, size, monkeypatch):
    monkeypatch.setattr(rates, "_seconds", seconds(size))
    monkeypatch.setattr(rates, "_WIDTHS", {"cpu": (8, 64)})
    measured = rates.measure_rates(moejax.make_mesh(data=2, expert=4), axis, jnp.float32)
    assert measured.link.bandwidth == pytest.approx(BANDWIDTH)
    assert measured.link.memory_bandwidth == pytest.approx(MEMORY)
    assert measured.flops == pytest.approx(FLOPS)
    # Of the small exchange is left, without the call, latency and the time of its few bytes.
    assert LATENCY < measured.link.latency < LATENCY + 4096 / BANDWIDTH


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
