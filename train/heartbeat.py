"""Whether the other processes of a run are still there: each one is connected to process 0, and gives signs of life.

jax has heartbeats too. They go by the clock on the wall, so they take a run that was suspended for lost when it wakes.
These go by the time in which a process could work (`train.clock`), also between steps, where no watchdog looks.

What is lost is told apart: a process that fails says why. One that is killed leaves a connection that ends. A node that
is silent does not acknowledge what was sent. A process that is stopped gives no sign, while its system acknowledges.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence

from train import ending
from train.clock import now
from train.errors import ConfigError, OthersLost, RunError, TrainingFailed

SIGN_SECONDS = 5.0
"""How often each process gives a sign of life."""
NODE_SECONDS = 30.0
"""How long the system of another node may leave a sign unacknowledged; then the node, or the way to it, is lost."""
SILENT_SECONDS = 300.0
"""After so long without a sign a process is lost. It may only wait for a disk that lets none of its threads run."""
REASON_SECONDS = 5.0
"""How long process 0 goes on after it has found another one lost: it may end by a better reason."""

_POLL_SECONDS = 0.5
# How long a process stays after its last words. They get lost if a sign that it has not read is left when it ends, and
# jax aborts those that lose its coordinator, which is in process 0.
_TOLD_SECONDS = 1.0
_NAMED = 8  # lost processes
# Lines between processes; an empty one is a sign of life.
_BYE, _FAILED, _VERDICT = "bye", "failed ", "verdict "

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
      error: its own, by which it ends.
      verdict: the error by which it says that all end.
    """

    def __init__(self, number: int, node: str, connection: socket.socket):
        self.number, self.node, self.connection = number, node, connection
        self.gone, self.has_left = "", False
        self.error: RunError | None = None
        self.verdict: RunError | None = None
        self._heard_at, self._unread = now(), b""
        connection.setblocking(False)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux only
            milliseconds = round(1000 * NODE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

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
        for line in (each.decode(errors="replace") for each in lines):
            if line == _BYE:
                self.has_left = True
            elif line.startswith(_FAILED):
                self.error = _error_in(line.removeprefix(_FAILED))
            elif line.startswith(_VERDICT):
                self.verdict = _error_in(line.removeprefix(_VERDICT))

    def close(self) -> None:
        """Close the connection so that the last line arrives: what is unread would make the system break it off."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_TOLD_SECONDS)
            while self.connection.recv(4096):
                pass
        self.connection.close()

    def lost(self) -> str:
        """Why it counts as lost; empty while it does not."""
        if self.has_left:
            return ""
        if self.error is not None:
            return f"failed: {self.error}"
        if self.gone or now() - self._heard_at <= SILENT_SECONDS:
            return self.gone
        return f"has given no sign of life for {SILENT_SECONDS:.0f} s"

    def _fail(self, error: OSError) -> None:
        if isinstance(error, ConnectionResetError | BrokenPipeError):
            self.gone = self.gone or "has ended"
        else:
            reason = error.strerror or error
            self.gone = self.gone or f"cannot be reached: {reason}; look at its node, and at the way to it"


def _line_of(error: RunError) -> str:
    return f"{error.exit_code} {' '.join(str(error).split())}"


def _error_in(line: str) -> RunError:
    """The error of `_line_of`. A code that is no bad input and no failure is that of processes which lost others."""
    code, _, text = line.partition(" ")
    return _error(int(code) if code.isdecimal() else 0, text)


def _error(code: int, text: str) -> RunError:
    error = OthersLost(text)
    if code in (ConfigError.exit_code, TrainingFailed.exit_code):
        error.exit_code = code
    return error


class Heartbeat:
    """A thread that gives signs of life to the peers, and ends this process when one of them is lost.

    Args:
      peers: all other processes, in process 0; that one, in the others.
      me: number of this process.
      count: of all.
      end: is given the error that ends this process; replaced in tests.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        me: int,
        count: int,
        end: Callable[[RunError], None] = ending.end_at_once,
    ):
        self._peers, self._me, self._count, self._end = list(peers), me, count, end
        self._found_at = now()  # that somebody is lost; later and later while nobody is
        self._verdict: RunError | None = None
        self._parts, self._has_parted = threading.Event(), threading.Event()
        self._said_goodbye = False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def part(self, seconds: float = ending.CLOSE_SECONDS) -> None:
        """End in order: come back when all others do so too, or after so long.

        jax waits for all of them again, but for half a minute on the clock on the wall.
        """
        deadline = now() + seconds
        self._parts.set()
        while self._thread.is_alive() and now() < deadline:
            self._has_parted.wait(_POLL_SECONDS)
        self._has_parted.set()
        self._thread.join()
        for peer in self._peers:
            peer.close()

    def tell(self, error: RunError) -> None:
        """Tell the others the error by which this process ends; come back when they have had time to hear it."""
        line = (_VERDICT if error is self._verdict else _FAILED) + _line_of(error)
        for peer in self._peers:
            peer.send(line)
        if any(not peer.gone for peer in self._peers):
            time.sleep(_TOLD_SECONDS)

    def _run(self) -> None:
        try:
            self._watch()
        except Exception as error:  # without its signs all would end in a while, and nobody would know why
            self._end(TrainingFailed(f"the heartbeat has failed: {type(error).__name__}: {error}"))

    def _watch(self) -> None:
        signed_at: float | None = None
        with selectors.DefaultSelector() as selector:
            for peer in self._peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while not self._has_parted.is_set():
                if signed_at is None or now() - signed_at >= SIGN_SECONDS:
                    signed_at = now()
                    for peer in self._peers:
                        peer.send()
                for key, _ in selector.select(0):
                    key.data.hear()
                    if key.data.gone or key.data.has_left:
                        selector.unregister(key.fileobj)
                self._verdict = None if ending.is_ending() else self._judge()
                if self._verdict is not None:
                    self._end(self._verdict)
                    return
                # Not in `select`: process 0 would look through its peers at each sign of each of them.
                if self._parts.wait(_POLL_SECONDS):
                    self._say_goodbye()
                    time.sleep(_POLL_SECONDS / 10)

    def _say_goodbye(self) -> None:
        """Process 0 says it last, so that who has heard it knows that all have ended in order."""
        all_have = all(peer.has_left for peer in self._peers)
        if not self._said_goodbye and (self._me != 0 or all_have):
            self._said_goodbye = True
            for peer in self._peers:
                peer.send(_BYE)
        if all_have:
            self._has_parted.set()

    def _judge(self) -> RunError | None:
        """The error that ends this process, if that of others is one."""
        for peer in self._peers:
            if peer.verdict is not None:
                return peer.verdict
        lost = [(peer, why) for peer in self._peers if (why := peer.lost())]
        if not lost:
            self._found_at = now()
            return None
        has_failed = self._me != 0 and self._peers[0].error  # process 0, and its coordinator ends with it
        if not has_failed and now() - self._found_at <= REASON_SECONDS:
            return None
        named = [f"process {peer.number} of {self._count} (on {peer.node}) {why}" for peer, why in lost]
        if len(named) > _NAMED:
            named[_NAMED:] = [f"and {len(named) - _NAMED} more"]
        text = ", ".join(named)
        failed = next((peer.error for peer, _ in lost if peer.error), None)
        if failed is not None:
            return _error(failed.exit_code, text)
        return OthersLost(f"{text}; the same command goes on from the last checkpoint")


def await_verdict(symptom: str) -> None:
    """Wait for the heartbeat to end this process by the name of who is lost; it does not end if nobody is.

    Args:
      symptom: how this process has noticed that something is wrong.
    """
    log.warning("%s; looking for a process that is lost", symptom)
    deadline = now() + SIGN_SECONDS + NODE_SECONDS + REASON_SECONDS + 2 * _TOLD_SECONDS
    while now() < deadline:
        time.sleep(_POLL_SECONDS)
