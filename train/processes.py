"""How the processes of one run find each other: by flags, by `moejax launch`, or by the cluster that started them.

The coordinator is a service inside process 0. Every process connects to it once, before jax looks for devices.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from train.errors import ConfigError, FailedTogether, TrainingFailed
from train.fields import shown
from train.place import LAUNCHER, Place, find_place, gpu_of, open_mpi_place, slurm_place

HEARTBEAT_SECONDS = 30
"""After so long without a sign of life a process counts as lost, and all others end."""
PARTING_SECONDS = 30
"""How long a process that ends waits for the others to end too; then they count as told, and end."""
CONNECT_SECONDS = 180
"""How long the processes of a run wait for each other at its begin."""
PATIENCE_SECONDS = 10
"""How long a process waits for others before it says so."""

COMPILE_SECONDS = 1800
"""How long a process waits for the others to compile."""

_SIGNAL_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG
_ESTABLISHED = "01"  # TCP_ESTABLISHED

_meetings = itertools.count()

log = logging.getLogger("moejax")


def join(options: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> None:
    """Connect this process to the others of its run, if it has any.

    Args:
      options: see `find_place`.

    Raises:
      ConfigError: the coordinator cannot be reached, or nobody says where it is. Where others do not come, the process
        ends by itself, with the same line and code.
    """
    if environment.get(LAUNCHER, "").isdecimal():
        _end_with(int(environment[LAUNCHER]))
    place = find_place(options, environment) or slurm_place(environment) or open_mpi_place(environment)
    if place is None:
        if "JOBSET_NAME" in environment:
            _join_on_kubernetes()
        return
    if place.processes == 1:
        return
    gpu = gpu_of(place, environment)
    try:
        if place.process_id > 0:
            with _saying(place, lambda: f"process 0 at {place.coordinator}"):
                _wait_for_coordinator(place)
        give_up = partial(_give_up, place)
        with _saying(place, partial(_the_others, place)), _after(CONNECT_SECONDS, give_up):
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process_id,
                local_device_ids=gpu,
                cluster_detection_method="deactivate",
                initialization_timeout=2 * CONNECT_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=PARTING_SECONDS,
                coordinator_bind_address=place.listens_on,
            )
    except (ValueError, RuntimeError) as error:  # such as a port in use
        reason = str(error).partition("\n")[0]
        rule = f"process {place.process_id} could not join there: {reason}"
        raise ConfigError("--coordinator", place.coordinator, rule) from error


def _end_with(launcher: int) -> None:
    """Get SIGTERM when the launcher ends, however it ends: no process may be left behind. Linux only."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_SIGNAL_AT_PARENTS_DEATH, signal.SIGTERM)
    if os.getppid() != launcher:  # it was faster
        os.kill(os.getpid(), signal.SIGTERM)


def _join_on_kubernetes() -> None:
    """By jax's own detection, which asks the cluster for the coordinator's address."""
    try:
        jax.distributed.initialize(
            initialization_timeout=CONNECT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=PARTING_SECONDS,
        )
    except (ImportError, ValueError, RuntimeError) as error:
        rule = (
            f"Kubernetes started processes, but they do not find each other ({error}); say where process 0 is"
        )
        raise ConfigError("--coordinator", "(nothing)", rule) from error


@contextlib.contextmanager
def _saying(place: Place, what: Callable[[], str]) -> Iterator[None]:
    """Warn once of what this process waits for if the block takes long."""

    def warn() -> None:
        log.warning(
            "process %d of %d waits for %s, up to %.0f s",
            *(place.process_id, place.processes, what(), CONNECT_SECONDS),
        )

    with _after(PATIENCE_SECONDS, warn):
        yield


@contextlib.contextmanager
def _after(seconds: float, act: Callable[[], None]) -> Iterator[None]:
    """A block that is followed by `act`, in a thread of its own, if it takes so long."""
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _the_others(place: Place) -> str:
    """Whom a process waits for at the coordinator; process 0 also says how many of them are there."""
    text = f"the others to come to {place.coordinator}"
    came = None if place.process_id else _connected_to(int(place.coordinator.rpartition(":")[2]))
    return text if came is None else f"{text} ({came} of {place.processes - 1} are there)"


def _connected_to(port: int) -> int | None:
    """Processes that are connected to this port of process 0, besides itself; None where the system does not tell."""
    lines: list[str] = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):  # Linux only
        with contextlib.suppress(OSError), open(table) as file:
            lines += file.readlines()[1:]
    ends = [(local.rpartition(":")[2], state) for _, local, _, state, *_ in map(str.split, lines)]
    return max(0, ends.count((f"{port:04X}", _ESTABLISHED)) - 1) if lines else None


def _give_up(place: Place) -> None:
    """End this process as bad input does: left alone, jax would abort it with a C++ stack."""
    rule = (
        f"process {place.process_id} of {place.processes} has waited {CONNECT_SECONDS:.0f} s for "
        f"{_the_others(place)}; look at the output of those that are not"
    )
    error = ConfigError("--coordinator", place.coordinator, rule)
    print("error:", error, file=sys.stderr, flush=True)
    os._exit(error.exit_code)


def _wait_for_coordinator(place: Place) -> None:
    """Try to reach the coordinator's port: jax would wait for minutes and end with a C++ stack."""
    host, _, port = place.coordinator.rpartition(":")
    deadline, reason = time.monotonic() + CONNECT_SECONDS, ""
    while time.monotonic() < deadline:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    rule = f"process {place.process_id} could not reach it within {CONNECT_SECONDS} s: {reason}"
    raise ConfigError("--coordinator", place.coordinator, rule)


def versions() -> str:
    """What must be alike in all processes, or their programs differ."""
    return ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("moejax", "jax", "jaxlib", "flax", "optax")
    )


def is_first() -> bool:
    """Whether this is the process that writes the run's files and shows its progress."""
    return jax.process_index() == 0


def from_first(value: bool) -> bool:
    """Process 0's `value`, in every process; all must ask."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))


def compile_together(function: Any, *arguments: Any) -> Callable[..., Any]:
    """The jitted `function`, compiled for these arguments (or their shapes) in every process before any goes on.

    On CPU a process that compiles half a minute longer than another is otherwise taken for lost: Gloo, which carries
    the collectives there, waits for no longer.
    """
    if jax.process_count() == 1:
        return function
    from orbax.checkpoint import multihost

    compiled = function.lower(*arguments).compile()
    # Named processes meet at the coordinator; unnamed ones would by a collective, with Gloo's limit.
    everyone = set(range(jax.process_count()))
    multihost.sync_global_processes(
        f"compiled {next(_meetings)}", timeout=COMPILE_SECONDS, processes=everyone
    )
    return compiled


def exchange_texts(mine: str, topic: str, seconds: float = COMPILE_SECONDS) -> list[str] | None:
    """Process 0 gets the text of every process, by number; the others get None. All must call, each topic once.

    Through the coordinator, not through devices: no collective can time out while one process is late, and processes
    whose programs differ can still say so. Also for use beside the main thread.
    """
    client, me = _client(), jax.process_index()
    if me:
        client.key_value_set(f"moejax/{topic}/{me}", mine)
        return None
    deadline = time.monotonic() + seconds
    texts = [mine]
    for other in range(1, jax.process_count()):
        left = max(1, int(1000 * (deadline - time.monotonic())))
        texts.append(client.blocking_key_value_get(f"moejax/{topic}/{other}", left))
        client.key_value_delete(f"moejax/{topic}/{other}")
    return texts


def tell_all(text: str, topic: str, seconds: float = COMPILE_SECONDS) -> str:
    """Process 0's text, in every process; all must call, with the same topic, once."""
    if jax.process_index() == 0:
        _client().key_value_set(f"moejax/{topic}", text)
        return text
    return _client().blocking_key_value_get(f"moejax/{topic}", int(1000 * seconds))


def put(topic: str, text: str) -> None:
    """Leave a text of this process where all can read it; a later one replaces it."""
    _client().key_value_set(f"moejax/{topic}/{jax.process_index()}", text, allow_overwrite=True)


def look(topic: str) -> dict[int, str]:
    """What `put` has left under a topic, by process."""
    found = _client().key_value_dir_get(f"moejax/{topic}/")
    return {int(key.rpartition("/")[2]): text for key, text in found}


def _client() -> Any:
    from jax._src import distributed  # jax has no public name for the coordinator's store

    return distributed.global_state.client


def new_topic(name: str) -> str:
    """A topic that has not been used; all processes must ask for the same ones in the same order."""
    return f"{name}/{next(_meetings)}"


@contextlib.contextmanager
def refusing_together() -> Iterator[None]:
    """A block in which one process alone may find bad input, or fail: then all end by its error. All must enter it.

    Of several processes that have an error, the one of the lowest number says how all of them end. Nothing in the block
    may wait for other processes.

    Raises:
      ConfigError: that process has refused its input.
      FailedTogether: it could not go on.
    """
    mine: ConfigError | TrainingFailed | OSError | None = None
    try:
        yield
    except (ConfigError, TrainingFailed, OSError) as error:
        if jax.process_count() == 1:
            raise
        mine = error
    if jax.process_count() == 1:
        return
    topic = new_topic("refusal")
    parts = [mine.field, str(mine.value), mine.rule] if isinstance(mine, ConfigError) else [str(mine)]
    everyone = exchange_texts(json.dumps(parts if mine else None), topic)
    refusals = [(number, json.loads(text)) for number, text in enumerate(everyone or [])]
    number, first = json.loads(
        tell_all(json.dumps(next((one for one in refusals if one[1]), (0, None))), topic)
    )
    if first is None:
        return
    is_mine = number == jax.process_index()
    if len(first) == 1:
        raise FailedTogether(first[0] if is_mine else f"process {number}: {first[0]}") from mine
    field, value, rule = first
    raise ConfigError(field, value, rule if is_mine else f"{rule} (seen by process {number})") from mine


def require_agreement(texts: Mapping[str, str]) -> None:
    """Compare what all processes must have alike; all must call.

    Args:
      texts: what is compared, by the name that an error gives it.

    Raises:
      ConfigError: in every process, naming the processes that differ from process 0, and in what.
    """
    if jax.process_count() == 1:
        return
    topic = new_topic("agreement")
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    everyone = exchange_texts(json.dumps(digests), topic)
    verdict = json.dumps(_differing([json.loads(one) for one in everyone]) if everyone else None)
    differing: dict[str, list[int]] = json.loads(tell_all(verdict, topic))
    for name, numbers in differing.items():
        listed = ", ".join(map(str, numbers[:8])) + (" and more" if len(numbers) > 8 else "")
        rule = f"must be the same in every process, but that of process {listed} is not that of process 0"
        raise ConfigError(name, shown(f"{texts[name]} in process {jax.process_index()}"), rule)


def _differing(everyone: list[dict[str, str]]) -> dict[str, list[int]]:
    """Name -> the processes whose entry is not that of process 0, for the names that have any."""
    first = everyone[0]
    numbers = {
        name: [number for number, one in enumerate(everyone) if one.get(name) != digest]
        for name, digest in first.items()
    }
    return {name: found for name, found in numbers.items() if found}
