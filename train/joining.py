"""How the processes of one run find each other: by flags, by `moejax launch`, or by the cluster that started them.

The coordinator is a service inside process 0. Every process connects to it once, before jax looks for devices.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import jax

from train.clock import unless_done_within
from train.errors import ConfigError
from train.meeting import meet, reach
from train.place import LAUNCHER, Place, find_place, gpu_of, open_mpi_place, slurm_place
from train.streams import say

HEARTBEAT_SECONDS = 7 * 24 * 3600
"""Limit of jax's own heartbeats, which count the time asleep; `train.heartbeat` notices who is lost."""
PARTING_SECONDS = 30
"""How long jax waits at the end for all processes, once they have parted (`train.heartbeat`)."""
CONNECT_SECONDS = 180
"""How long the processes of a run wait for each other at its begin."""
PATIENCE_SECONDS = 10
"""How long a process waits for others before it says so."""

_SIGNAL_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG
_ESTABLISHED = "01"  # TCP_ESTABLISHED

log = logging.getLogger("moejax")


def join(options: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> None:
    """Connect this process to the others of its run, if it has any.

    Args:
      options: see `find_place`.

    Raises:
      ConfigError: the coordinator cannot be reached, or nobody says where it is. Where others do not come, the process
        ends by itself, with the same line and code.
    """
    environment = {name: value for name, value in environment.items() if value}  # empty is unset
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
            with _saying_what_it_waits_for(place, lambda: f"process 0 at {place.coordinator}"):
                _wait_for_coordinator(place)
        give_up = partial(_give_up, place)
        with (
            _saying_what_it_waits_for(place, partial(_the_others, place)),
            unless_done_within(CONNECT_SECONDS, give_up),
        ):
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
    meet(place.listens_on)


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
    meet(None)


@contextlib.contextmanager
def _saying_what_it_waits_for(place: Place, what: Callable[[], str]) -> Iterator[None]:
    """Warn once of what this process waits for if the block takes long."""

    def warn() -> None:
        log.warning(
            "process %d of %d waits for %s, up to %.0f s",
            *(place.process_id, place.processes, what(), CONNECT_SECONDS),
        )

    with unless_done_within(PATIENCE_SECONDS, warn):
        yield


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
    say(f"error: {error}")
    os._exit(error.exit_code)


def _wait_for_coordinator(place: Place) -> None:
    """Try to reach the coordinator's port: jax would wait for minutes and end with a C++ stack."""
    host, _, port = place.coordinator.rpartition(":")
    try:
        reach(host.strip("[]"), int(port), CONNECT_SECONDS).close()
    except TimeoutError as error:
        rule = f"process {place.process_id} {error}"
        raise ConfigError("--coordinator", place.coordinator, rule) from error
