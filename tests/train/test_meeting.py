"""All processes come to process 0, strangers are sent away, and who does not come is named."""

import functools
import socket
import threading

import jax
import pytest

from tests.train import launching
from train import ending, meeting, processes
from train.errors import ConfigError, OthersLost
from train.heartbeat import Heartbeat


@pytest.fixture
def meet(monkeypatch):
    """`meet(number, count)` begins the heartbeat of that process in a thread; gives it and what it raises."""
    told, here, begun = {}, threading.local(), []

    def tell_all(text, topic, seconds=0.0):
        if here.number == 0:
            told[topic] = text
        launching.wait_until(lambda: topic in told)
        return told[topic]

    monkeypatch.setattr(processes, "identity", lambda: (here.number, here.count, "localhost:1"))
    monkeypatch.setattr(processes, "tell_all", tell_all)
    monkeypatch.setattr(meeting, "Heartbeat", functools.partial(Heartbeat, end=[].append))
    monkeypatch.setattr(ending, "join_others", begun.append)

    def begin(number, count):
        errors = []

        def run():
            here.number, here.count = number, count
            try:
                meeting.meet("localhost:1")
            except ConfigError as error:
                errors.append(str(error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread, errors

    begin.told, begin.begun = told, begun
    yield begin
    for beating in begun:
        beating.part(0)


def test_all_meet_at_process_0_and_strangers_are_sent_away(meet):
    first, errors = meet(0, 3)
    launching.wait_until(lambda: "meeting" in meet.told)
    port = int(meet.told["meeting"].split()[0])
    strangers = [meeting.reach("localhost", port, 10) for _ in range(20)]  # who say nothing
    for says in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"x" * 10_000,
        b"\xff 1 node\n",
        "\N{SNOWMAN} 1 node\n".encode(),
    ):
        strangers.append(meeting.reach("localhost", port, 10))
        strangers[-1].sendall(says)
    others = [meet(number, 3) for number in (2, 1)]
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
    seen = sorted(sorted(peer.number for peer in beating._peers) for beating in meet.begun)
    assert seen == [[0], [0], [1, 2]]


def test_who_does_not_come_is_named(meet, monkeypatch):
    monkeypatch.setattr(meeting, "ARRIVAL_SECONDS", 5.0)
    first, errors = meet(0, 4)
    second, _ = meet(2, 4)
    first.join(20)
    second.join(20)
    (error,) = errors
    assert error.startswith("--coordinator = localhost:1: process 0 of 4: no sign of process 1, 3 at port ")
    assert error.endswith(" within 5 s; the node of process 0 must let the others in at any port")


def test_a_port_that_is_closed_to_a_process_is_named(meet, monkeypatch):
    monkeypatch.setattr(meeting, "ARRIVAL_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    meet.told["meeting"] = f"{port} token node0"
    thread, errors = meet(1, 2)
    thread.join(20)
    (error,) = errors
    assert f"process 1 of 2: could not reach port {port} within 1 s: " in error


@pytest.mark.parametrize("host", [None, "localhost", "127.0.0.1"])
def test_process_0_listens_where_its_coordinator_does(host):
    with meeting._listener(host) as listener:
        address, port, *_ = listener.getsockname()
        assert address in (("::", "0.0.0.0") if host is None else ("::1", "127.0.0.1"))
        meeting.reach(host or "localhost", port, 5).close()


def test_a_process_0_that_tells_nothing_is_lost(monkeypatch):
    def tell_all(*_):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: reset\nmore")

    monkeypatch.setattr(processes, "identity", lambda: (1, 2, "localhost:1"))
    monkeypatch.setattr(processes, "tell_all", tell_all)
    with pytest.raises(OthersLost, match=r"^process 0 of 2 tells nothing: UNAVAILABLE: reset$") as raised:
        meeting.meet(None)
    assert raised.value.exit_code == 134


def test_process_0_listens_where_there_is_no_ipv6(monkeypatch):
    create = socket.create_server

    def without(address, *, family=socket.AF_INET, **options):
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return create(address, family=family, **options)

    monkeypatch.setattr(socket, "create_server", without)
    with meeting._listener(None) as listener:
        meeting.reach("127.0.0.1", listener.getsockname()[1], 5).close()
