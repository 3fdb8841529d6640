"""The check before the first step: right answers pass, wrong ones and missing devices are named."""

import jax
import pytest

import moejax
from train import selfcheck
from train.errors import ConfigError, TrainingFailed


@pytest.fixture
def mesh():
    return moejax.make_mesh(data=2, expert=4, devices=jax.devices()[:8])


def test_every_axis_is_timed(mesh):
    lines = selfcheck.check_collectives(mesh)
    names = [line.partition(":")[0] for line in lines]
    assert names == ["data all-to-all", "data all-reduce", "expert all-to-all", "expert all-reduce"]
    assert all(" GB/s from each of " in line for line in lines)
    assert selfcheck.check_collectives(moejax.make_mesh(devices=jax.devices()[:1])) == []


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        # One device's rows come back unsent; one device's part is added twice.
        ("all-to-all", lambda exchange: lambda x, axis, *rest, **options: x),
        ("all-reduce", lambda reduce: lambda x, axis: reduce(x, axis) + (jax.lax.axis_index(axis) == 1)),
    ],
)
def test_a_wrong_answer_is_named(mesh, monkeypatch, name, broken):
    function = {"all-to-all": "all_to_all", "all-reduce": "psum"}[name]
    monkeypatch.setattr(jax.lax, function, broken(getattr(jax.lax, function)))
    with pytest.raises(TrainingFailed, match=f"^self-check: the {name} over mesh axis data gives wrong"):
        selfcheck.check_collectives(mesh)


@pytest.mark.parametrize(
    ("seen", "fault"),
    [
        ([(None, 2), (None, 2)], None),
        ([(None, 2), (None, 1)], (1, 1, 2)),
        ([(2, 2), (2, 2)], None),
        ([(8, 1), (8, 1)], (0, 1, 8)),
        ([(2, 2), (2, 2), (2, 8)], (2, 8, 2)),
    ],
)
def test_the_first_process_with_other_devices_than_promised(seen, fault):
    everyone = [{"promised": promised, "seen": count} for promised, count in seen]
    assert selfcheck._wrong_counts(everyone) == fault


def test_the_cure_is_named(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(selfcheck.processes, "exchange_texts", lambda mine, topic: [mine, mine])
    monkeypatch.setattr(selfcheck.processes, "tell_all", lambda text, topic: text)
    monkeypatch.setenv("MOEJAX_DEVICES_PER_PROCESS", "9")
    with pytest.raises(ConfigError, match=r"process 0 sees 8 devices, not 9; .*never --gpus-per-task"):
        selfcheck.check_devices()
