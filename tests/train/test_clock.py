"""Time asleep is no time at work, wherever time is measured."""

import functools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import pytest

from train import checkpoint, clock, growth, monitor
from train.checkpoint import Checkpoints
from train.clock import ASLEEP_SECONDS, TICK_SECONDS, Clock, unless_done_within
from train.config import CheckpointConfig, LogConfig
from train.errors import SaveStuck
from train.growth import Growth, size_of
from train.metrics import read
from train.terminal import Pace
from train.watchdog import Watchdog


@pytest.fixture
def system(monkeypatch):
    """`system.pass_by(seconds)` while this process works, `system.now += seconds` while it is suspended."""

    class System:
        now = 1000.0

        def pass_by(self, seconds):
            for _ in range(round(seconds / TICK_SECONDS)):
                self.now += TICK_SECONDS
                clock.now()

    made = System()
    awake = Clock(lambda: made.now)
    monkeypatch.setattr(clock, "_of_this_process", lambda: awake)
    return made


def test_a_gap_counts_as_one_tick(system):
    began = clock.now()
    system.pass_by(20)
    assert clock.now() - began == 20
    system.now += 3600
    assert clock.now() - began == 20 + TICK_SECONDS
    system.now += ASLEEP_SECONDS
    assert clock.now() - began == 20 + TICK_SECONDS + ASLEEP_SECONDS, "a short wait is work"


def test_what_is_not_counted_is_logged_at_most_once_a_minute(system, caplog):
    """A call that lets no other thread run is taken for a suspension too."""
    caplog.set_level(logging.INFO, "moejax")
    for gap in (100, 20, 30, 5, 60):
        system.now += gap
        clock.now()
    why = "s do not count as work: the process was suspended, or nothing in it could run"
    assert caplog.messages == [f"99 {why}", f"{19 + 29 + 59} {why}"]


def test_no_one_counts_the_time_asleep(system, tmp_path):
    """The watchdog's limit and waiting time, steps' seconds, time left, minutes between checkpoints."""
    log = LogConfig(tensorboard=False, every=1)
    config = CheckpointConfig(every_minutes=1)
    with (
        Checkpoints(tmp_path / "checkpoints", config) as checkpoints,
        open(os.devnull, "w") as nowhere,
        monitor.Monitor(
            tmp_path, log, total_steps=8, start_step=0, tokens_per_step=1, stream=nowhere
        ) as shown,
    ):
        dog, pace = Watchdog(tmp_path, factor=10, seconds=30), Pace(8, clock.now)
        dog.finished(0)
        pace.remaining(0)
        for step in range(1, 5):
            dog.begun(step)
            system.pass_by(4)
            system.now += 7200 if step > 1 else 0
            dog.finished(step)
            shown.train(step, {})
            left = pace.remaining(step)
        assert not checkpoints.is_late(), "16 s of work and 3 ticks"
        system.pass_by(60)
        assert checkpoints.is_late()
    assert list(dog._times) == [4, 5, 5, 5] and dog.limit() == 50
    assert left == "0:19"
    assert [line["step_seconds"] for line in read(tmp_path / "metrics.jsonl")] == [4, 5, 5, 5]


def test_a_write_may_be_suspended_for_hours(monkeypatch, tmp_path):
    seconds = []
    made = types.SimpleNamespace(close=lambda: None)
    orbax = lambda _, timeout_secs: seconds.append(timeout_secs) or made  # noqa: E731
    monkeypatch.setattr(checkpoint.ocp, "AsyncCheckpointer", orbax)
    with Checkpoints(tmp_path, CheckpointConfig()):
        pass
    assert seconds == [24 * 3600], "by the clock on the wall"


def test_a_write_that_hangs_ends_the_run_after_ten_minutes_awake(system, monkeypatch, tmp_path):
    answers, waited, ending = threading.Event(), [], []
    monkeypatch.setattr(checkpoint, "end_soon", ending.append)

    def wait(_, timeout):
        waited.append(timeout)
        system.pass_by(timeout)
        system.now += 7200 if len(waited) == 1 else 0

    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    monkeypatch.setattr(checkpoint.futures, "wait", wait)
    written = checkpoint.write_manifest
    monkeypatch.setattr(checkpoint, "write_manifest", lambda *given: answers.wait(60) and written(*given))
    checkpoints.save(1, {"w": jax.numpy.ones(2)}, {}, {})
    try:
        for _ in range(2):  # the error of `save`, and of the end of the block that it leaves
            with pytest.raises(SaveStuck, match=r"step 1 .* its files have not grown for 600 s"):
                checkpoints.close()
        assert isinstance(ending[0], SaveStuck), "however long the files of the run take to close"
        assert sum(waited) == 600 - TICK_SECONDS, "time asleep is one tick"
    finally:
        answers.set()
        monkeypatch.undo()
    while checkpoints._saving and not checkpoints._saving[1].done():
        time.sleep(0.01)
    checkpoints.close()
    assert checkpoints.steps() == [1]


def test_a_slow_write_goes_on_while_its_files_grow(system, monkeypatch, tmp_path):
    answers, waited = threading.Event(), []

    def wait(_, timeout):
        if sum(waited) == 1000:
            answers.set()
            time.sleep(0.01)
            return
        waited.append(timeout)
        system.pass_by(timeout)
        if sum(waited) == 500:
            checkpoints._saving[2].seen_at = clock.now()

    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        written = checkpoint.write_manifest
        monkeypatch.setattr(checkpoint, "write_manifest", lambda *given: answers.wait(60) and written(*given))
        checkpoints.save(1, {"w": jax.numpy.ones(2)}, {}, {})
        monkeypatch.setattr(checkpoint.futures, "wait", wait)
        checkpoints.wait()
    assert sum(waited) == 1000 and checkpoints.steps() == [1]


def test_growth_is_seen_until_the_disk_does_not_answer(system, monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "LOOK_SECONDS", 0.01)
    folder, looks, answers = tmp_path / "a" / "b", [], threading.Event()

    def size(path):
        looks.append(path)
        if len(looks) > 40:
            answers.wait(60)
        return size_of(path)

    monkeypatch.setattr(growth, "size_of", size)
    seen = Growth(tmp_path / "a")
    began = seen.seen_at
    try:
        for content in ("x", "xy", "xyz"):
            system.pass_by(7)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "file").write_text(content)
            for _ in range(1000):
                if seen.seen_at == clock.now():
                    break
                time.sleep(0.005)
            assert seen.seen_at == clock.now(), content
        while len(looks) <= 40:
            time.sleep(0.01)
        system.pass_by(100)
        (folder / "file").write_text("more")
        time.sleep(0.05)
        assert seen.seen_at == began + 21 and len(looks) == 41
    finally:
        seen.stop()
        answers.set()


def test_patience_ends_by_itself_and_with_the_block():
    said = []
    with unless_done_within(0.01, lambda: said.append("late")):
        while not said:
            time.sleep(0.01)
    with unless_done_within(0.05, lambda: said.append("never")):
        pass
    time.sleep(0.1)
    assert said == ["late"]


def test_a_block_that_ends_at_the_last_moment_was_in_time(monkeypatch):
    """It ends between the last wait and the look at the clock that finds it late."""
    looks, at_the_last_look, left, said = [], threading.Event(), threading.Event(), []

    def look():
        looks.append(None)
        if len(looks) == 3:
            at_the_last_look.set()
            left.wait(20)
        return len(looks)

    monkeypatch.setattr(clock, "now", look)
    monkeypatch.setattr(clock, "TICK_SECONDS", 0.01)
    before = set(threading.enumerate())
    with unless_done_within(1.5, lambda: said.append("late")):
        (thread,) = set(threading.enumerate()) - before
        assert at_the_last_look.wait(20)
    left.set()
    thread.join(20)
    assert len(looks) == 3 and not thread.is_alive() and not said


def test_threads_that_ask_at_the_same_time_get_the_same_clock(monkeypatch):
    made, start = [], threading.Barrier(8)

    def slow():
        made.append(None)
        time.sleep(0.05)
        return Clock()

    monkeypatch.setattr(clock, "_make", functools.cache(slow))
    threads = [threading.Thread(target=lambda: (start.wait(), clock.now())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


SUSPENDED = """
import pathlib, sys, time
from train import clock
from train.watchdog import Watchdog
clock.TICK_SECONDS, clock.ASLEEP_SECONDS = 0.1, 0.5
with Watchdog(pathlib.Path(sys.argv[1]), factor=2.0, seconds=1.0) as dog:
    for step in range(1, 60):
        dog.begun(step)
        time.sleep(0.05)
        dog.finished(step)
        if step == 10:
            print("steps come", flush=True)
print("steps went on")
"""


def test_a_run_that_was_suspended_goes_on(tmp_path):
    line = [sys.executable, "-c", SUSPENDED, tmp_path]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout.readline() == "steps come\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        assert process.communicate()[0] == "steps went on\n"
    assert process.returncode == 0
