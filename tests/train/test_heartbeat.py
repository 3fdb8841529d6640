"""Processes that are lost are noticed, however they are; those that were suspended, or have ended in order, are not."""

import functools
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from tests.train import launching, small
from tests.train.launching import start, wait_for_step
from train import clock, ending, heartbeat, joining, launch, processes
from train.clock import ASLEEP_SECONDS, TICK_SECONDS, Clock
from train.config import MeshConfig
from train.errors import ConfigError
from train.heartbeat import SILENT_SECONDS, Heartbeat, Peer

GOES_ON = "; the same command goes on from the last checkpoint"


@pytest.fixture(autouse=True)
def not_ending(monkeypatch):
    monkeypatch.setattr(ending, "_begun", threading.Event())


@pytest.fixture
def fast(monkeypatch):
    for name, seconds in {"SIGN": 0.05, "SILENT": 1.0, "GRACE": 0.2}.items():
        monkeypatch.setattr(heartbeat, f"{name}_SECONDS", seconds)
    monkeypatch.setattr(heartbeat, "_POLL_SECONDS", 0.02)


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


def ends_with(beating, seconds=20.0):
    """The error that ends a process which beats with a list's `append` for an end."""
    beating._thread.join(seconds)
    assert not beating._thread.is_alive()
    (error,) = beating._end.__self__
    assert error.exit_code == 134
    return str(error)


def test_signs_of_life_keep_a_run_going_and_a_goodbye_ends_in_order(fast, connected):
    first, second = connected(1)
    beating, other = Heartbeat([second], 2, [].append), Heartbeat([first], 2, [].append)
    time.sleep(2.5 * heartbeat.SILENT_SECONDS)
    assert beating._thread.is_alive() and other._thread.is_alive()
    other.leave()
    first.connection.close()
    time.sleep(1.5 * heartbeat.SILENT_SECONDS)
    assert beating._thread.is_alive()
    beating.leave()
    assert beating._end.__self__ == other._end.__self__ == []


@pytest.mark.parametrize("how", ["closed", "reset", "silent"])
def test_a_lost_process_is_named_to_all(fast, connected, how):
    (lost, second), (first, third) = (connected(number) for number in (1, 2))
    others = Heartbeat([second, third], 3, [].append), Heartbeat([first], 3, [].append)
    if how == "closed":
        lost.connection.close()
    if how == "reset":  # as by a node that has started anew
        lost.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        lost.connection.close()
    what = "has given no sign of life for 1 s" if how == "silent" else "has ended"
    for beating in others:
        assert ends_with(beating) == f"process 1 of 3 (on node1) {what}{GOES_ON}"


def test_process_0_is_watched_by_the_others(fast, connected):
    first, second = connected(1)
    beating = Heartbeat([first], 2, [].append)
    second.connection.close()
    assert ends_with(beating) == f"process 0 of 2 (on node0) has ended{GOES_ON}"


def test_of_many_that_are_lost_eight_are_named(fast, connected):
    pairs = [connected(number) for number in range(1, 12)]
    for first, _ in pairs:
        first.connection.close()
    text = ends_with(Heartbeat([other for _, other in pairs], 12, [].append))
    assert text.count("has ended") == 8 and text.endswith(
        f"process 8 of 12 (on node8) has ended, and 3 more{GOES_ON}"
    )


def test_a_process_that_ends_by_an_error_of_its_own_is_left_alone(fast, connected):
    ending.begin_to_end()
    first, second = connected(1)
    beating = Heartbeat([second], 2, [].append)
    first.connection.close()
    time.sleep(5 * heartbeat.GRACE_SECONDS)
    assert beating._thread.is_alive() and not beating._end.__self__
    ending._begun.clear()
    assert ends_with(beating)


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
    monkeypatch.setattr(heartbeat, "_PARTING_SECONDS", 0.05)
    first, second = connected(1)
    beating = Heartbeat([second], 2, [].append)
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
heartbeat.SIGN_SECONDS, heartbeat.NODE_SECONDS, heartbeat.GRACE_SECONDS = 0.2, 3.0, 0.2
with socket.create_server(("127.0.0.1", 0)) as listener:
    far = socket.create_connection(listener.getsockname())
    near = Peer(1, "node1", listener.accept()[0])
ended = []
beating = Heartbeat([near], 2, ended.append)
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


@pytest.fixture
def meeting(monkeypatch):
    """`meeting(number, count)` begins the heartbeat of that process in a thread; gives it and what it raises."""
    told, here, begun = {}, threading.local(), []

    def tell_all(text, topic, seconds=0.0):
        if here.number == 0:
            told[topic] = text
        launching.wait_until(lambda: topic in told)
        return told[topic]

    monkeypatch.setattr(processes, "place", lambda: (here.number, here.count, "localhost:1"))
    monkeypatch.setattr(processes, "tell_all", tell_all)
    monkeypatch.setattr(heartbeat, "Heartbeat", functools.partial(Heartbeat, end=[].append))
    monkeypatch.setattr(heartbeat.atexit, "register", lambda leave: begun.append(leave.__self__))

    def begin(number, count):
        errors = []

        def run():
            here.number, here.count = number, count
            try:
                heartbeat.begin("localhost:1")
            except ConfigError as error:
                errors.append(str(error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread, errors

    begin.told, begin.begun = told, begun
    yield begin
    for beating in begun:
        beating.leave()


def test_all_meet_at_process_0_and_strangers_are_sent_away(meeting, monkeypatch):
    monkeypatch.setattr(heartbeat, "_HELLO_SECONDS", 0.2)
    first, errors = meeting(0, 3)
    launching.wait_until(lambda: "heartbeat" in meeting.told)
    port = int(meeting.told["heartbeat"].split()[0])
    strangers = []
    for says in (
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        b"x" * 10_000,
        b"\xff 1 node\n",
        "\N{SNOWMAN} 1 node\n".encode(),
    ):
        strangers.append(heartbeat.reach("localhost", port, 10))
        strangers[-1].sendall(says)
    others = [meeting(number, 3) for number in (2, 1)]
    for thread, raised in ((first, errors), *others):
        thread.join(30)
        assert not thread.is_alive() and not raised
    for stranger in strangers:
        stranger.settimeout(10)
        try:
            assert stranger.recv(1) == b""
        except ConnectionResetError:
            pass
        stranger.close()
    seen = sorted(sorted(peer.number for peer in beating._peers) for beating in meeting.begun)
    assert seen == [[0], [0], [1, 2]]


def test_who_does_not_come_is_named(meeting, monkeypatch):
    monkeypatch.setattr(heartbeat, "MEETING_SECONDS", 1.0)
    first, errors = meeting(0, 4)
    second, _ = meeting(2, 4)
    first.join(20)
    second.join(20)
    (error,) = errors
    assert error.startswith("--coordinator = localhost:1: process 0 of 4: process 1, 3 did not come to port ")
    assert error.endswith(" within 1.0 s; besides this port its node must have others open to the others")


def test_a_port_that_is_closed_to_a_process_is_named(meeting, monkeypatch):
    monkeypatch.setattr(heartbeat, "MEETING_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    meeting.told["heartbeat"] = f"{port} token node0"
    thread, errors = meeting(1, 2)
    thread.join(20)
    (error,) = errors
    assert f"process 1 of 2: could not reach port {port} within 1.0 s: " in error


@pytest.mark.parametrize("host", [None, "localhost", "127.0.0.1"])
def test_process_0_listens_where_its_coordinator_does(host):
    with heartbeat._listener(host) as listener:
        address, port, *_ = listener.getsockname()
        assert address in (("::", "0.0.0.0") if host is None else ("::1", "127.0.0.1"))
        heartbeat.reach(host or "localhost", port, 5).close()


def test_jax_takes_no_suspended_process_for_lost(monkeypatch):
    """Its heartbeats go by the clock on the wall."""
    given = []
    monkeypatch.setattr(joining.jax.distributed, "initialize", lambda *_, **options: given.append(options))
    monkeypatch.setattr(joining, "_end_with", lambda launcher: None)
    monkeypatch.setattr(heartbeat, "begin", lambda listens_on: given.append(listens_on))
    joining.join({}, {"MOEJAX_COORDINATOR": "h:1", "MOEJAX_PROCESSES": "2", "MOEJAX_PROCESS_ID": "0"})
    joining._join_on_kubernetes()
    seconds = [options["heartbeat_timeout_seconds"] for options in given[::2]]
    assert seconds == [7 * 24 * 3600] * 2 and given[1::2] == ["h:1", None]


LIMITS = "from train import heartbeat\nheartbeat.SIGN_SECONDS, heartbeat.SILENT_SECONDS = 1.0, 8.0\n"
# Process 1 comes to nothing, while process 0 waits for it at the coordinator, where no step is watched.
BEFORE_THE_FIRST_STEP = """
import os, signal
from train import processes

agree = processes.require_agreement

def stopped(texts):
    if os.environ["MOEJAX_PROCESS_ID"] == "1":
        os.kill(os.getpid(), signal.SIGNAL)
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


@pytest.mark.landing
@pytest.mark.parametrize(
    ("how", "what"), [("SIGSTOP", "has given no sign of life for 8 s"), ("SIGKILL", "has ended")]
)
def test_a_process_that_is_lost_before_the_first_step_ends_the_run(config, tmp_path, how, what):
    config.write_text(LIMITS + BEFORE_THE_FIRST_STEP.replace("SIGNAL", how) + config.read_text())
    first, second = by_hand(config, tmp_path / "run")
    try:
        output = first.communicate(timeout=120)[0]
        line = f"error: process 1 of 2 (on {os.uname().nodename}) {what}{GOES_ON}"
        assert first.returncode == 134 and line in output.splitlines(), output
        if how == "SIGSTOP":
            assert second.poll() is None
            second.send_signal(signal.SIGCONT)
            output = second.communicate(timeout=60)[0]
            assert second.returncode == 134 or second.returncode == -signal.SIGABRT, output
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
