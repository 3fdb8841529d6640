"""How the processes of one run find each other: by flags, by `moejax launch`, or by the cluster that started them.

The coordinator is a service inside process 0. Every process connects to it once, before jax looks for devices.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from train.errors import ConfigError
from train.fields import shown

log = logging.getLogger("moejax")

HEARTBEAT_SECONDS = 30
"""After so long without a sign of life a process counts as lost, and all others end."""
CONNECT_SECONDS = 60
"""How long a process tries to reach the coordinator before it gives up."""

COMPILE_SECONDS = 1800
"""How long a process waits for the others to compile."""

_meetings = itertools.count()

# Set by `moejax launch` for each process it starts.
COORDINATOR, PROCESSES, PROCESS_ID = "MOEJAX_COORDINATOR", "MOEJAX_PROCESSES", "MOEJAX_PROCESS_ID"

# A scheduler's variable that holds the number of processes -> its name. jax reads the rest itself.
_SCHEDULERS = {"SLURM_NTASKS": "Slurm", "OMPI_COMM_WORLD_SIZE": "Open MPI", "JOBSET_NAME": "Kubernetes"}


@dataclass(frozen=True)
class Place:
    """Where a process stands in its run.

    Fields:
      coordinator: host:port of process 0's service.
      processes: of the whole run.
      process_id: 0 to processes - 1.
    """

    coordinator: str
    processes: int
    process_id: int


def find_place(options: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> Place | None:
    """This process's place by flags or by `moejax launch`; None when neither says anything.

    Args:
      options: `coordinator`, `processes` and `process_id` of the command line: all of them or none.

    Raises:
      ConfigError: one is missing, no number, or out of range.
    """
    names = {"coordinator": COORDINATOR, "processes": PROCESSES, "process_id": PROCESS_ID}
    given = {name: options.get(name, environment.get(variable)) for name, variable in names.items()}
    if not any(given.values()):
        return None
    for name, value in given.items():
        if not value:
            raise ConfigError(f"--{name}", "(nothing)", f"must be given along with {', '.join(names)}")
    coordinator = str(given["coordinator"])
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError("--coordinator", coordinator, "must be HOST:PORT of process 0")
    processes, process_id = (
        _number("--processes", given["processes"]),
        _number("--process_id", given["process_id"]),
    )
    if processes < 1:
        raise ConfigError("--processes", processes, "must be at least 1")
    if process_id >= processes:
        raise ConfigError("--process_id", process_id, f"must be below --processes ({processes})")
    return Place(coordinator, processes, process_id)


def _number(name: str, text: str | None) -> int:
    if text is None or not text.isdecimal():
        raise ConfigError(name, text, "must be a whole number of at least 0")
    return int(text)


def scheduler(environment: Mapping[str, str] = os.environ) -> str | None:
    """The scheduler that started this process as one of several, by name; None when there is none."""
    for variable, name in _SCHEDULERS.items():
        count = environment.get(variable, "1")
        # A shell inside a Slurm allocation has the job's variables, but only `srun` gives a process its number.
        started = variable != "SLURM_NTASKS" or "SLURM_STEP_ID" in environment
        if started and (not count.isdecimal() or int(count) > 1):
            return name
    return None


def join(options: Mapping[str, str]) -> None:
    """Connect this process to the others of its run, if it has any.

    Args:
      options: see `find_place`.

    Raises:
      ConfigError: the coordinator cannot be reached, or the scheduler does not say where it is.
    """
    place = find_place(options)
    if place is None:
        if (name := scheduler()) is not None:
            _join_by_scheduler(name)
        return
    if place.processes == 1:
        return
    if place.process_id > 0:
        _wait_for_coordinator(place)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=CONNECT_SECONDS,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        coordinator_bind_address=place.coordinator,
    )


def _join_by_scheduler(name: str) -> None:
    try:
        jax.distributed.initialize(
            initialization_timeout=CONNECT_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except (ValueError, RuntimeError) as error:
        rule = f"{name} started several processes, but they cannot find each other ({error}); say where process 0 is"
        raise ConfigError("--coordinator", "(nothing)", rule) from error


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
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "optax")
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


def require_agreement(texts: Mapping[str, str]) -> None:
    """Compare what all processes must have alike; all must call.

    Args:
      texts: what is compared, by the name that an error gives it.

    Raises:
      ConfigError: in every process, naming the first process that differs from process 0, and in what.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digests = [hashlib.sha256(text.encode()).digest()[:8] for text in texts.values()]
    mine = np.frombuffer(b"".join(digests), np.uint32).reshape(len(texts), 2)
    all_PNd = np.asarray(multihost_utils.process_allgather(mine))
    for name, theirs_Pd in zip(texts, all_PNd.swapaxes(0, 1), strict=True):
        differing = np.flatnonzero((theirs_Pd != theirs_Pd[0]).any(axis=1))
        if len(differing):
            rule = f"must be the same in every process, but that of process {differing[0]} is not that of process 0"
            raise ConfigError(name, shown(f"{texts[name]} in process {jax.process_index()}"), rule)
