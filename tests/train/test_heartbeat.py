"""Processes that are lost are noticed, however they are; those that were suspended, or have ended in order, are not."""

import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

from tests.train import launching, small
from tests.train.launching import start, wait_for_step
from train import clock, ending, heartbeat, joining, launch
from train.clock import ASLEEP_SECONDS, TICK_SECONDS, Clock
from train.config import MeshConfig
from train.errors import ConfigError, FailedTogether, OthersLost, TrainingFailed
from train.heartbeat import SILENT_SECONDS, Heartbeat, Peer
from train.watchdog import Watchdog

GOES_ON = "; the same command goes on from the last checkpoint"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Nobody is about to end, and nobody has others."""
    monkeypatch.setattr(ending, "_ends_by", -math.inf)
    monkeypatch.setattr(ending, "_others", [])


@pytest.fixture
def fast(monkeypatch):
    for name, seconds in {"SIGN": 0.05, "SILENT": 3.0, "REASON": 0.2}.items():
        monkeypatch.setattr(heartbeat, f"{name}_SECONDS", seconds)
    monkeypatch.setattr(heartbeat, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(heartbeat, "_TOLD_SECONDS", 0.05)


@pytest.fixture
def connected():
    """`connected(number)`: process 0 as process `number` sees it, and that process as process 0 sees it."""
    sockets = []

    def connect(number):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            sockets.append(socket.create_connection(listener.getsockname()))
            sockets.append(listener.accept()[0])
        return Peer(0, "node0", sockets[-2]), Peer(number, f"node{number}", sockets[-1])

    yield connect
    for one in sockets:
        one.close()


def beat(*peers, me=0, count=None):
    """A heartbeat that ends its process as far as this is possible here."""
    errors = []

    def end(error):
        errors.append(error)
        made.tell(error)

    made = Heartbeat(peers, me, count or len(peers) + 1, end)
    made.errors = errors
    return made


def ends_with(beating, code=134, seconds=20.0):
    """What ends its process."""
    beating._thread.join(seconds)
    assert not beating._thread.is_alive()
    (error,) = beating.errors
    assert error.exit_code == code
    return str(error)


def test_signs_of_life_keep_a_run_going_and_all_part_together(fast, connected):
    (first, second), (also_first, third) = connected(1), connected(2)
    all_three = beat(second, third), beat(first, me=1, count=3), beat(also_first, me=2, count=3)
    time.sleep(1.5 * heartbeat.SILENT_SECONDS)
    assert all(beating._thread.is_alive() for beating in all_three)
    parting = []
    for beating in all_three:
        assert all(thread.is_alive() for thread in parting), "not before the last one"
        parting.append(threading.Thread(target=beating.part))
        parting[-1].start()
        time.sleep(2 * heartbeat.REASON_SECONDS)
    for thread in parting:
        thread.join(20)
        assert not thread.is_alive()
    assert [str(error) for beating in all_three for error in beating.errors] == []


def test_a_process_parts_alone_when_others_take_too_long(fast, connected):
    first, second = connected(1)
    there, beating = beat(first, me=1, count=2), beat(second)
    beating.part(0.5)
    assert not beating._thread.is_alive() and not beating.errors
    assert ends_with(there)


def test_who_is_killed_while_all_part_is_lost(fast, connected):
    first, second = connected(1)
    beating = beat(second)
    parting = threading.Thread(target=beating.part)
    parting.start()
    first.connection.close()
    assert ends_with(beating) == f"process 1 of 2 (on node1) has ended{GOES_ON}"
    parting.join(20)
    assert not parting.is_alive()


@pytest.mark.parametrize("how", ["closed", "reset", "silent"])
def test_a_lost_process_is_named_to_all(fast, connected, how):
    (lost, second), (first, third) = (connected(number) for number in (1, 2))
    others = beat(second, third), beat(first, me=2, count=3)
    if how == "closed":
        lost.connection.close()
    if how == "reset":  # as by a node that has started anew
        lost.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        lost.connection.close()
    what = "has given no sign of life for 3 s" if how == "silent" else "has ended"
    for beating in others:
        assert ends_with(beating) == f"process 1 of 3 (on node1) {what}{GOES_ON}"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("data.path", "/x", "no such\nfile"), 2),
        (TrainingFailed("No space left on device"), 3),
        (OthersLost("Gloo: closed"), 134),
    ],
)
def test_all_end_by_the_error_of_one(fast, connected, error, code):
    (first, second), (also_first, third) = connected(1), connected(2)
    others = beat(second, third), beat(also_first, me=2, count=3)
    beat(first, me=1, count=3).tell(error)
    for beating in others:
        text = f"process 1 of 3 (on node1) failed: {' '.join(str(error).split())}"
        assert ends_with(beating, code) == text


def test_process_0_takes_the_others_with_it_at_once(fast, connected, monkeypatch):
    monkeypatch.setattr(heartbeat, "REASON_SECONDS", 1000)
    monkeypatch.setattr(heartbeat, "_TOLD_SECONDS", 2.0)
    first, second = connected(1)
    beating, left = beat(first, me=1, count=2), beat(second)
    began = time.monotonic()
    left.tell(TrainingFailed("full"))
    assert time.monotonic() - began >= 2, "the others must hear it, and need its coordinator until then"
    assert ends_with(beating, 3, seconds=0.1) == "process 0 of 2 (on node0) failed: full"


def test_process_0_is_watched_by_the_others(fast, connected):
    first, second = connected(1)
    beating = beat(first, me=1, count=2)
    second.connection.close()
    assert ends_with(beating) == f"process 0 of 2 (on node0) has ended{GOES_ON}"


def test_of_many_that_are_lost_eight_are_named(fast, connected):
    pairs = [connected(number) for number in range(1, 12)]
    for first, _ in pairs:
        first.connection.close()
    text = ends_with(beat(*(other for _, other in pairs)))
    assert text.count("has ended") == 8
    assert text.endswith(f"process 8 of 12 (on node8) has ended, and 3 more{GOES_ON}")


def test_a_process_that_ends_by_an_error_of_its_own_is_left_alone(fast, connected):
    ending.begin_to_end(2.0)
    first, second = connected(1)
    beating = beat(second)
    first.connection.close()
    time.sleep(1)
    assert beating._thread.is_alive() and not beating.errors
    assert ends_with(beating), "it has not ended in time"


def test_who_ends_by_an_error_of_its_own_says_so(tmp_path, monkeypatch):
    left = lambda: ending._ends_by - clock.now()  # noqa: E731
    for error in (OSError(28, "full"), MemoryError(), TrainingFailed("x"), FailedTogether("x"), KeyError()):
        monkeypatch.setattr(ending, "_ends_by", -math.inf)
        with pytest.raises(type(error)), ending.closing_after_errors():
            raise error
        is_own = not isinstance(error, FailedTogether | KeyError)
        assert ending.is_ending() == is_own and (not is_own or 590 < left() <= 600)
    monkeypatch.setattr(ending.threading, "Thread", lambda **_: types.SimpleNamespace(start=lambda: None))
    ending.end_soon(TrainingFailed("x"))
    assert 15 < left() <= 20
    monkeypatch.undo()


def test_the_watchdog_ends_by_an_error_of_its_own(tmp_path):
    with Watchdog(tmp_path, factor=2, seconds=0.2, end=lambda error: None) as dog:
        for step in range(4):
            dog.finished(step)
        dog._thread.join(20)
    assert 40 < ending._ends_by - clock.now() <= 50


def test_a_heartbeat_that_fails_ends_the_process(fast, connected, monkeypatch):
    first, second = connected(1)
    monkeypatch.setattr(second, "hear", lambda: 1 / 0)
    beating = beat(second)
    first.send()
    assert ends_with(beating, 3) == "the heartbeat has failed: ZeroDivisionError: division by zero"


def test_lines_may_come_in_pieces_and_be_anything(connected):
    first, second = connected(1)
    second.connection.setblocking(True)
    for piece in (b"fail", b"ed 2 data", b".path\n\n", b"\xff\nnothing known\nverdict x y\nby"):
        first.connection.sendall(piece)
        assert second.error is None or b"verdict" in piece
        second.hear()
    assert (str(second.error), second.error.exit_code) == ("data.path", 2)
    assert (str(second.verdict), second.verdict.exit_code, second.has_left) == ("y", 134, False)
    first.connection.sendall(b"e\n")
    second.hear()
    assert second.has_left and not second.lost()


def test_time_asleep_is_no_silence(connected, monkeypatch):
    class System:
        now = 1000.0

        def pass_by(self, seconds):
            for _ in range(round(seconds)):
                self.now += 1
                clock.now()

    system = System()
    awake = Clock(lambda: system.now)
    monkeypatch.setattr(clock, "_of_this_process", lambda: awake)
    first, second = connected(1)
    system.pass_by(SILENT_SECONDS - 10)
    system.now += 7 * 24 * 3600
    assert not second.lost()
    system.pass_by(10 - TICK_SECONDS)
    assert not second.lost()
    system.now += ASLEEP_SECONDS
    assert second.lost() == "has given no sign of life for 300 s"
    first.send()
    second.connection.setblocking(True)
    second.hear()
    assert not second.lost(), "it was only slow"


def test_what_a_stopped_process_does_not_read_stops_nobody(connected):
    first, _ = connected(1)
    first.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    for _ in range(10_000):
        first.send("x" * 1000)
    assert not first.gone


def test_who_notices_a_loss_by_its_effect_waits_until_it_is_named(fast, connected, monkeypatch, caplog):
    """By an error of Gloo, say, which comes first. The verdict ends the process meanwhile."""
    monkeypatch.setattr(heartbeat, "NODE_SECONDS", 3.0)
    first, second = connected(1)
    beating = beat(second)
    first.connection.close()
    heartbeat.await_verdict("Gloo: closed")
    assert not beating._thread.is_alive() and ends_with(beating)
    assert caplog.messages == ["Gloo: closed; looking for a process that is lost"]


# In a network of its own, whose only wire is cut.
CUT = """
import fcntl, socket, struct, sys
from train import heartbeat
from train.heartbeat import Heartbeat, Peer

def lo(flags):
    with socket.socket() as some:
        fcntl.ioctl(some, 0x8914, struct.pack("16sh", b"lo", flags))  # SIOCSIFFLAGS

lo(1)
heartbeat.SIGN_SECONDS, heartbeat.NODE_SECONDS, heartbeat.REASON_SECONDS = 0.2, 3.0, 0.2
with socket.create_server(("127.0.0.1", 0)) as listener:
    far = socket.create_connection(listener.getsockname())
    near = Peer(1, "node1", listener.accept()[0])
ended = []
beating = Heartbeat([near], 0, 2, ended.append)
beating._thread.join(4)
assert beating._thread.is_alive()
lo(0)
beating._thread.join(60)
print(*ended)
"""


@pytest.mark.landing
def test_a_node_that_does_not_answer_is_lost():
    try:
        subprocess.run(["unshare", "-rn", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network of its own can be made here: {error}")
    found = subprocess.run(
        ["unshare", "-rn", sys.executable, "-c", CUT], capture_output=True, text=True, timeout=120
    )
    assert found.stdout.startswith("process 1 of 2 (on node1) cannot be reached: "), found
    assert found.stdout.endswith(f"; look at its node, and at the way to it{GOES_ON}\n"), found


def test_jax_takes_no_suspended_process_for_lost(monkeypatch):
    """Its heartbeats go by the clock on the wall."""
    given = []
    monkeypatch.setattr(joining.jax.distributed, "initialize", lambda *_, **options: given.append(options))
    monkeypatch.setattr(joining, "_end_with", lambda launcher: None)
    monkeypatch.setattr(joining, "meet", lambda listens_on: given.append(listens_on))
    joining.join({}, {"MOEJAX_COORDINATOR": "h:1", "MOEJAX_PROCESSES": "2", "MOEJAX_PROCESS_ID": "0"})
    joining._join_on_kubernetes()
    seconds = [options["heartbeat_timeout_seconds"] for options in given[::2]]
    assert seconds == [7 * 24 * 3600] * 2 and given[1::2] == ["h:1", None]


LIMITS = "from train import heartbeat\nheartbeat.SIGN_SECONDS, heartbeat.SILENT_SECONDS = 1.0, 8.0\n"
# Process 1 comes to nothing, while process 0 waits for it at the coordinator, where no step is watched.
BEFORE_THE_FIRST_STEP = """
import os, signal
from train import processes
from train.errors import ConfigError

agree = processes.require_agreement

def stopped(texts):
    if os.environ["MOEJAX_PROCESS_ID"] == "1":
        BREAK
    agree(texts)

processes.require_agreement = stopped
"""


def by_hand(config, workdir, *options):
    """Both processes of a run, started as by hand."""
    place = {"MOEJAX_COORDINATOR": f"127.0.0.1:{launch._free_port()}", "MOEJAX_PROCESSES": "2"}
    words = ("train", config, "--cpu-devices", 2, "--workdir", workdir, *options)
    return [start(*words, env=place | {"MOEJAX_PROCESS_ID": str(number)}) for number in range(2)]


@pytest.fixture
def config(tmp_path):
    return launching.write_config(tmp_path, mesh=MeshConfig(expert=4))


@pytest.mark.landing
@pytest.mark.parametrize("seconds", [12, pytest.param(45, marks=pytest.mark.slow)])
def test_processes_that_were_suspended_go_on(config, tmp_path, seconds):
    if seconds < 30:
        config.write_text(LIMITS + config.read_text())
    both = by_hand(launching.paced(config), tmp_path / "run", "--steps", 24, "--checkpoint.every", 0)
    wait_for_step(tmp_path / "run", 7, both[0])
    for process in both:
        process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    for process in both:
        process.send_signal(signal.SIGCONT)
        time.sleep(4)  # they need not wake together
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert small.read_metrics(tmp_path / "run")[-1]["step"] == 24


STOPPED, KILLED = ("os.kill(os.getpid(), signal.SIGSTOP)", "os.kill(os.getpid(), signal.SIGKILL)")


@pytest.mark.landing
@pytest.mark.parametrize(
    ("how", "what", "codes"),
    [
        (STOPPED, f"has given no sign of life for 8 s{GOES_ON}", (134, 134)),
        (KILLED, f"has ended{GOES_ON}", (134, -signal.SIGKILL)),
        ("raise RuntimeError('a bug')", "failed: RuntimeError: a bug", (134, 1)),
        ("raise ConfigError('seed', 7, 'is not ours')", "failed: seed = 7: is not ours", (2, 2)),
        ("raise OSError(28, 'full')", "failed: [Errno 28] full", (3, 3)),
    ],
)
def test_a_process_that_is_lost_before_the_first_step_ends_the_run(config, tmp_path, how, what, codes):
    config.write_text(LIMITS + BEFORE_THE_FIRST_STEP.replace("BREAK", how) + config.read_text())
    first, second = by_hand(config, tmp_path / "run")
    try:
        output = first.communicate(timeout=120)[0]
        line = f"error: process 1 of 2 (on {os.uname().nodename}) {what}"
        assert first.returncode == codes[0] and line in output.splitlines(), output
        if how == STOPPED:
            assert second.poll() is None
            second.send_signal(signal.SIGCONT)
        output = second.communicate(timeout=60)[0]
        # A stopped one wakes to the verdict and to the end of jax's coordinator.
        assert second.returncode == codes[1] or (how == STOPPED and second.returncode == -signal.SIGABRT), (
            output
        )
        assert ("Traceback" in output) == ("a bug" in how), output
    finally:
        second.kill()
        second.communicate()


@pytest.mark.landing
def test_a_process_that_is_killed_in_a_step_is_named(config, tmp_path):
    both = by_hand(launching.paced(config), tmp_path / "run", "--steps", 1000, "--checkpoint.every", 0)
    wait_for_step(tmp_path / "run", 7, both[0])
    both[1].kill()
    output = both[0].communicate(timeout=60)[0]
    both[1].communicate()
    line = f"error: process 1 of 2 (on {os.uname().nodename}) has ended{GOES_ON}"
    assert both[0].returncode == 134 and output.splitlines()[-1] == line, output
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.splitlines()[-1].endswith(f"ended by OthersLost: {line.removeprefix('error: ')}")


# Process 0 has still to close its files when the other one is done.
SLOW_END = """
import os, pathlib, time
from train.data import batches

def close(self):
    pathlib.Path(FOLDER, os.environ["MOEJAX_PROCESS_ID"]).touch()
    time.sleep(12 if os.environ["MOEJAX_PROCESS_ID"] == "0" else 0)

batches.TrainingBatches.close = close
"""


@pytest.mark.slow
def test_processes_that_are_suspended_at_their_end_have_ended_well(config, tmp_path):
    config.write_text(SLOW_END.replace("FOLDER", repr(str(tmp_path))) + config.read_text())
    both = by_hand(config, tmp_path / "run", "--steps", 2)
    launching.wait_until(lambda: all((tmp_path / number).exists() for number in "01"), seconds=200)
    time.sleep(3)
    for process in both:
        process.send_signal(signal.SIGSTOP)
    time.sleep(36)
    for process in both:
        process.send_signal(signal.SIGCONT)
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
