"""Whether the other processes of a run are still there: each one is connected to process 0, and gives signs of life.

jax has heartbeats too. They go by the clock on the wall, so they take a run that was suspended for lost when it wakes.
These go by the time in which a process could work (`train.clock`), also between steps, where no watchdog looks.

What is lost is told apart: a process that ends closes its connection. A node that is silent does not acknowledge what
was sent. A process that is stopped gives no sign, while the system of its node still acknowledges everything.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import platform
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

import jax

from train import processes
from train.clock import now
from train.ending import end_at_once, is_ending
from train.errors import ConfigError, OthersLost, RunError

SIGN_SECONDS = 5.0
"""How often each process gives a sign of life."""
NODE_SECONDS = 30.0
"""How long the system of another node may leave a sign unacknowledged; then the node, or the way to it, is lost."""
SILENT_SECONDS = 300.0
"""After so long without a sign a process is lost. It may only wait for a disk that lets none of its threads run."""
GRACE_SECONDS = 5.0
"""How long a process that has found another one lost goes on: it may learn more, or end by an error of its own."""
MEETING_SECONDS = 60.0
"""How long the processes may take to connect to process 0."""

_POLL_SECONDS = 0.5
_PARTING_SECONDS = (
    1.0  # for the others to end by the verdict: jax aborts those that lose its coordinator, process 0
)
_HELLO_SECONDS, _LONGEST_HELLO = 5.0, 400
_BACKLOG = 4096  # processes may come at the same time
_NAMED = 8
_TOPIC, _BYE, _LOST = "heartbeat", "bye", "lost "


log = logging.getLogger("moejax")


class Peer:
    """Another process of the run, at the other end of a connection. All that is sent over it are lines.

    Args:
      number: its place among the processes.
      node: the name of the machine that it runs on.
      connection: to that process.

    Fields:
      gone: how its connection has ended without a goodbye; empty while it has not.
      has_left: it has ended in order.
      verdict: what process 0 says ends the run; empty while it says nothing.
    """

    def __init__(self, number: int, node: str, connection: socket.socket):
        self.number, self.node, self.connection = number, node, connection
        self.gone, self.has_left, self.verdict = "", False, ""
        self._heard_at, self._unread = now(), b""
        connection.setblocking(False)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux only
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(1000 * NODE_SECONDS))

    def send(self, line: str = "") -> None:
        """Send a line; an empty one is a sign of life."""
        try:
            self.connection.send(f"{line}\n".encode())
        except BlockingIOError:
            pass  # it has read nothing for very long, which its silence says too
        except OSError as error:
            self._fail(error)

    def hear(self) -> None:
        """Read what has come; something has, or the connection is at its end."""
        try:
            data = self.connection.recv(4096)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)
            return
        if not data:
            self.gone = self.gone or "has ended"
            return
        self._heard_at = now()
        *lines, self._unread = (self._unread + data).split(b"\n")
        for line in map(bytes.decode, lines):
            self.has_left = self.has_left or line == _BYE
            if line.startswith(_LOST):
                self.verdict = line.removeprefix(_LOST)

    def lost(self) -> str:
        """Why it counts as lost; empty while it does not."""
        if self.gone or now() - self._heard_at <= SILENT_SECONDS:
            return self.gone
        return f"has given no sign of life for {SILENT_SECONDS:.0f} s"

    def _fail(self, error: OSError) -> None:
        if isinstance(error, ConnectionResetError | BrokenPipeError):
            self.gone = self.gone or "has ended"
        else:
            reason = error.strerror or error
            self.gone = self.gone or f"cannot be reached: {reason}; look at its node, and at the way to it"


class Heartbeat:
    """A thread that gives signs of life to the peers, and ends this process when one of them is lost.

    Args:
      peers: all other processes, in process 0; that one, in the others.
      count: processes of the run.
      end: is given the error that ends this process; replaced in tests.
    """

    def __init__(self, peers: Sequence[Peer], count: int, end: Callable[[RunError], None] = end_at_once):
        self._peers, self._count, self._end = list(peers), count, end
        self._found_at = now()  # that somebody is lost; later and later while nobody is
        self._leaves = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """This process ends in order: the others may go on without it."""
        self._leaves.set()
        self._thread.join()
        for peer in self._peers:
            peer.send(_BYE)
            peer.connection.close()

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            signed_at: float | None = None
            while not (self._leaves.is_set() or self._ends_the_run()):
                if signed_at is None or now() - signed_at >= SIGN_SECONDS:
                    signed_at = now()
                    for peer in self._peers:
                        peer.send()
                for key, _ in selector.select(_POLL_SECONDS):
                    key.data.hear()
                    if key.data.gone or key.data.has_left:
                        selector.unregister(key.fileobj)

    def _ends_the_run(self) -> bool:
        """End this process, and tell the others, if somebody has been lost for long enough or process 0 says so."""
        verdict = next((peer.verdict for peer in self._peers if peer.verdict), "")
        lost = [peer for peer in self._peers if peer.lost() and not peer.has_left]
        if not lost:
            self._found_at = now()
        elif now() - self._found_at > GRACE_SECONDS:
            verdict = verdict or self._describe(lost)
        if not verdict or is_ending():
            return False
        for peer in self._peers:
            peer.send(_LOST + verdict)
        if len(self._peers) > len(lost):
            time.sleep(_PARTING_SECONDS)
        self._end(OthersLost(verdict))
        return True

    def _describe(self, lost: Sequence[Peer]) -> str:
        """Who is lost, and how, as one line."""
        named = [f"process {peer.number} of {self._count} (on {peer.node}) {peer.lost()}" for peer in lost]
        if len(named) > _NAMED:
            named[_NAMED:] = [f"and {len(named) - _NAMED} more"]
        return f"{', '.join(named)}; the same command goes on from the last checkpoint"


def begin(listens_on: str | None) -> None:
    """Connect this process with process 0 and watch it from now on; in process 0, with all others.

    Args:
      listens_on: host:port at which process 0 has its coordinator; it takes a further port of that host, of all
        addresses where it is None.

    Raises:
      ConfigError: a process cannot be reached.
    """
    me, count, coordinator = processes.place()
    host = coordinator.rpartition(":")[0].strip("[]")
    if count == 1:
        return
    try:
        if me == 0:
            with _listener(listens_on and host) as listener:
                peers = _gather(listener, count)
        else:
            peers = [_connect(host, me)]
    except (OSError, jax.errors.JaxRuntimeError) as error:  # the second: process 0 tells nothing
        reason = str(error).partition("\n")[0]
        rule = f"process {me} of {count}: {reason}; besides this port its node must have others open to the others"
        raise ConfigError("--coordinator", coordinator, rule) from error
    atexit.register(Heartbeat(peers, count).leave)


def await_verdict(symptom: str) -> None:
    """Wait for the heartbeat to end this process by the name of who is lost; it does not end if nobody is.

    Args:
      symptom: how this process has noticed that something is wrong.
    """
    log.warning("%s; looking for a process that is lost", symptom)
    time.sleep(GRACE_SECONDS + 2 * _PARTING_SECONDS + 2 * _POLL_SECONDS)


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
    raise TimeoutError(f"could not reach port {port} within {seconds} s: {reason}")


def _connect(host: str, me: int) -> Peer:
    """Process 0, to the others.

    Raises:
      TimeoutError: it cannot be reached.
    """
    port, token, node = processes.tell_all("", _TOPIC, MEETING_SECONDS).split(" ", 2)
    connection = reach(host, int(port), MEETING_SECONDS)
    connection.sendall(f"{token} {me} {platform.node()}\n".encode())
    return Peer(0, node, connection)


def _listener(host: str | None) -> socket.socket:
    """A socket that listens at a free port of this host; of all addresses where there is none."""
    if host:
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
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
    deadline = now() + MEETING_SECONDS
    listener.settimeout(_POLL_SECONDS)
    with contextlib.ExitStack() as opened:
        while len(peers) < count - 1:
            if now() > deadline:
                missing = sorted(set(range(1, count)) - set(peers))
                named = ", ".join(map(str, missing[:_NAMED])) + (" and more" if len(missing) > _NAMED else "")
                raise TimeoutError(f"process {named} did not come to port {port} within {MEETING_SECONDS} s")
            with contextlib.suppress(TimeoutError):
                connection = opened.enter_context(listener.accept()[0])
                hello = _first_line(connection).split(" ", 2)
                if len(hello) == 3 and secrets.compare_digest(hello[0].encode(), token.encode()):
                    number = int(hello[1])
                    peers[number] = Peer(number, hello[2], connection)
                else:
                    connection.close()
        opened.pop_all()
    return list(peers.values())


def _first_line(connection: socket.socket) -> str:
    """What comes before the first end of a line, within `_HELLO_SECONDS`; nothing from a stranger."""
    connection.settimeout(_HELLO_SECONDS)
    line = b""
    with contextlib.suppress(OSError):
        while not line.endswith(b"\n") and len(line) < _LONGEST_HELLO and (data := connection.recv(1)):
            line += data
    return line.decode(errors="replace").rstrip("\n")
