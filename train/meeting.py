"""How the processes of a run come to be connected to process 0, each by a connection for its heartbeat."""

from __future__ import annotations

import contextlib
import ipaddress
import platform
import secrets
import selectors
import socket
import time
from typing import cast

import jax

from train import ending, processes
from train.clock import now
from train.errors import ConfigError, OthersLost
from train.heartbeat import Heartbeat, Peer

ARRIVAL_SECONDS = 60.0
"""How long the processes may take to connect to process 0."""

_TOPIC = "meeting"
_POLL_SECONDS = 0.5
_BACKLOG = 4096  # processes may come at the same time
_LONGEST_HELLO = 400  # characters
_NAMED = 8  # processes that have not come


def meet(listens_on: str | None) -> None:
    """Connect this process with process 0, or process 0 with all others, and begin its heartbeat.

    Args:
      listens_on: host:port at which process 0 has its coordinator, if not at all addresses.

    Raises:
      ConfigError: a process cannot be reached.
      OthersLost: process 0 has ended.
    """
    me, count, coordinator = processes.identity()
    if count == 1:
        return
    host = coordinator.rpartition(":")[0].strip("[]")
    try:
        if me == 0:
            with _listener(host if listens_on else None) as listener:
                peers = _gather(listener, count)
        else:
            peers = [_connect(host, me)]
    except TimeoutError as error:
        rule = f"process {me} of {count}: {error}; the node of process 0 must let the others in at any port"
        raise ConfigError("--coordinator", coordinator, rule) from error
    except jax.errors.JaxRuntimeError as error:
        raise OthersLost(f"process 0 of {count} tells nothing: {str(error).partition(chr(10))[0]}") from error
    ending.join_others(Heartbeat(peers, me, count))


def reach(host: str, port: int, seconds: float) -> socket.socket:
    """A connection to this port, tried for so long.

    Raises:
      TimeoutError: there is none; says why.
    """
    deadline, reason = now() + seconds, ""
    while now() < deadline:
        try:
            return socket.create_connection((host, port), timeout=2)
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise TimeoutError(f"could not reach port {port} within {seconds:.0f} s: {reason}")


def _connect(host: str, me: int) -> Peer:
    """Process 0, to the others.

    Raises:
      TimeoutError: it cannot be reached.
    """
    port, token, node = processes.tell_all("", _TOPIC, ARRIVAL_SECONDS).split(" ", 2)
    with contextlib.ExitStack() as opened:
        connection = opened.enter_context(reach(host, int(port), ARRIVAL_SECONDS))
        connection.sendall(f"{token} {me} {platform.node()}\n".encode())
        opened.pop_all()
    return Peer(0, node, connection)


def _listener(host: str | None) -> socket.socket:
    """A socket that listens at a free port: of all addresses, or of the loopback if that is what the host is."""
    if host:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        if ipaddress.ip_address(address[0]).is_loopback:
            return socket.create_server((address[0], 0), family=family, backlog=_BACKLOG)
    try:
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    except (OSError, ValueError):  # no IPv6
        return socket.create_server(("", 0), backlog=_BACKLOG)


def _gather(listener: socket.socket, count: int) -> list[Peer]:
    """The others, to process 0, once all have connected. Who does not know the token that it told them is a stranger.

    Raises:
      TimeoutError: some do not come; names them.
    """
    token = secrets.token_hex(16)
    port = listener.getsockname()[1]
    processes.tell_all(f"{port} {token} {platform.node()}", _TOPIC)
    peers: dict[int, Peer] = {}
    deadline = now() + ARRIVAL_SECONDS
    listener.setblocking(False)
    with contextlib.ExitStack() as opened, selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(peers) < count - 1:
            if now() > deadline:
                missing = sorted(set(range(1, count)) - set(peers))
                named = ", ".join(map(str, missing[:_NAMED])) + (" and more" if len(missing) > _NAMED else "")
                raise TimeoutError(
                    f"no sign of process {named} at port {port} within {ARRIVAL_SECONDS:.0f} s"
                )
            for key, _ in selector.select(_POLL_SECONDS):
                come = cast(socket.socket, key.fileobj)
                if come is listener:
                    with contextlib.suppress(OSError):  # who came has gone again
                        connection = opened.enter_context(listener.accept()[0])
                        connection.setblocking(False)
                        selector.register(connection, selectors.EVENT_READ, bytearray())
                elif (hello := _hello(come, key.data)) is not None:
                    selector.unregister(come)
                    known, number, node = (*hello.split(" ", 2), "", "")[:3]
                    if secrets.compare_digest(known.encode(), token.encode()):
                        peers[int(number)] = Peer(int(number), node, come)
                    else:
                        come.close()
        for key in list(selector.get_map().values()):
            if key.fileobj is not listener:
                cast(socket.socket, key.fileobj).close()  # it has said nothing so far
        opened.pop_all()
    return list(peers.values())


def _hello(connection: socket.socket, unread: bytearray) -> str | None:
    """The first line that comes over a connection: None as long as there is more to come, empty from a stranger."""
    try:
        data = connection.recv(_LONGEST_HELLO)
    except BlockingIOError:
        return None
    except OSError:
        return ""
    unread += data
    if b"\n" in unread:
        return unread.partition(b"\n")[0].decode(errors="replace")
    return "" if not data or len(unread) > _LONGEST_HELLO else None
