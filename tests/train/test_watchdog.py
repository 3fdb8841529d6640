"""A step that never ends is ended, and who is behind is named; a slow one is not."""

import os
import re
import threading

import jax
import pytest

from train import watchdog
from train.watchdog import Watchdog, behind


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.time = 0.0

    def now(self):
        return self.time


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(watchdog, "clock", made)
    return made


def timed(dog, clock, *seconds):
    """Steps that take so long, each fetched when it is done."""
    dog.finished(0)
    for step, duration in enumerate(seconds, 1):
        dog.begun(step)
        clock.time += duration
        dog.finished(step)


def test_the_limit_follows_the_median_and_the_steps_begun(tmp_path, clock):
    dog = Watchdog(tmp_path, factor=10, seconds=5)
    assert dog.limit() is None, "the first step compiles"
    timed(dog, clock, 60, 1, 2, 1, 1)
    assert dog.limit() == 10
    dog.begun(9)  # the host runs ahead: four steps are under way
    assert dog.limit() == 40
    timed(dog, clock, *[0.1] * 50)
    assert dog.limit() == 5, "never less than what is never too long"


def test_pauses_do_not_count(tmp_path, clock):
    dog = Watchdog(tmp_path, factor=10, seconds=5)
    timed(dog, clock, 1, 1, 1)
    with dog.paused():
        clock.time += 1000
    dog.begun(4)
    clock.time += 2
    dog.finished(4)
    assert list(dog._times) == [1, 1, 1, 2]


def test_a_step_that_never_ends(tmp_path, capfd):
    ended = threading.Event()
    errors = []

    def end(error):
        errors.append(error)
        ended.set()

    with Watchdog(tmp_path, factor=2, seconds=0.2, end=end) as dog:
        dog.finished(0)
        for step in (1, 2, 3):
            dog.finished(step)
        assert ended.wait(30)
    (error,) = errors
    assert error.exit_code == 3
    assert re.match(r"step 4 has not ended after \d+ s; all stacks are in", str(error))
    assert "test_a_step_that_never_ends" in capfd.readouterr().err
    assert "test_a_step_that_never_ends" in (tmp_path / "logs" / "stacks-0.txt").read_text()


def test_stacks_do_not_wait_for_a_disk_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "WRITE_SECONDS", 0.2)
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "stacks-0.txt")  # whoever opens it waits for a reader
    ended, errors = threading.Event(), []

    def end(error):
        errors.append(str(error))
        ended.set()

    with Watchdog(tmp_path, factor=2, seconds=0.2, end=end) as dog:
        for step in range(4):
            dog.finished(step)
        was_in_time = ended.wait(20)
        os.close(os.open(tmp_path / "logs" / "stacks-0.txt", os.O_RDONLY | os.O_NONBLOCK))
    assert was_in_time
    assert f"; no stacks could be written to {tmp_path}/logs, look at the disk; " in errors[0]


@pytest.mark.parametrize("how", ["silent", "gone", "broken"])
def test_a_coordinator_that_does_not_answer_holds_nobody(tmp_path, monkeypatch, how):
    monkeypatch.setattr(watchdog, "REPORT_SECONDS", 0.5)
    monkeypatch.setattr(watchdog.jax, "process_count", lambda: 2)
    monkeypatch.setattr(watchdog.processes, "look", lambda topic: {0: "4", 1: "4"})
    answers, ended, errors = threading.Event(), threading.Event(), []

    def put(topic, text):
        if how == "gone":
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: connection reset")
        if how == "broken":
            raise KeyError(topic)
        answers.wait(60)

    def end(error):
        errors.append(str(error))
        ended.set()

    monkeypatch.setattr(watchdog.processes, "put", put)
    with Watchdog(tmp_path, factor=2, seconds=0.2, end=end) as dog:
        for step in range(4):
            dog.finished(step)
        was_in_time = ended.wait(20)
        answers.set()
        dog._thread.join(20)
    assert was_in_time and ", and the coordinator does not answer; the same command" in errors[0]


def test_nothing_is_watched_when_it_is_switched_off(tmp_path):
    with Watchdog(tmp_path, factor=0, seconds=0.01) as dog:
        assert not dog._thread.is_alive()


@pytest.mark.parametrize(
    ("standing", "text"),
    [
        ({0: 7, 1: 7}, ", which all have begun"),
        ({0: 9, 1: 7}, ": step 9 has been begun, process 1 is at step 7"),
        ({0: 9}, ": step 9 has been begun, process 1 gives no sign"),
    ],
)
def test_who_is_behind(standing, text):
    assert behind(standing, 2) == text
