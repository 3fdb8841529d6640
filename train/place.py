"""The place of a process in its run: said by flags, by `moejax launch`, or by the scheduler that started it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from train.errors import ConfigError
from train.fields import shown

# Set by `moejax launch` for each process it starts; DEVICES is how many each one was promised, NEIGHBOURS how many
# processes share the machine, LAUNCHER the id of the process that has started them.
COORDINATOR, PROCESSES, PROCESS_ID = "MOEJAX_COORDINATOR", "MOEJAX_PROCESSES", "MOEJAX_PROCESS_ID"
DEVICES = "MOEJAX_DEVICES_PER_PROCESS"
NEIGHBOURS, LAUNCHER = "MOEJAX_PROCESSES_PER_NODE", "MOEJAX_LAUNCHER"

_FIRST_PORT, _PORTS = 2**16 - 2**12, 2**12  # the top of the ephemeral range, where jax looks as well


@dataclass(frozen=True)
class Place:
    """The place of a process in its run.

    Fields:
      coordinator: host:port of process 0's service.
      processes: of the whole run.
      process_id: 0 to processes - 1.
      neighbours: processes on this node; unset where nobody says.
      local_id: this one's number among them.
      listens_on: host:port to which process 0 binds; unset: the port on all addresses, because a scheduler's name for
        the node may be that of the loopback there.
    """

    coordinator: str
    processes: int
    process_id: int
    neighbours: int | None = None
    local_id: int | None = None
    listens_on: str | None = None


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
            flags = [f"--{flag.replace('_', '-')}" for flag in names]
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(flag, "(nothing)", f"must be given along with {', '.join(flags)}")
    coordinator = str(given["coordinator"])
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError("--coordinator", coordinator, "must be HOST:PORT of process 0")
    processes, process_id = (
        _number("--processes", given["processes"]),
        _number("--process-id", given["process_id"]),
    )
    if processes < 1:
        raise ConfigError("--processes", processes, "must be at least 1")
    if process_id >= processes:
        raise ConfigError("--process-id", process_id, f"must be below --processes ({processes})")
    return Place(coordinator, processes, process_id, *_neighbourhood(environment), coordinator)


def _neighbourhood(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    """Processes on this node, and the number of this one among them, where `moejax launch` or Open MPI say so."""
    if NEIGHBOURS in environment:
        return _given(environment, NEIGHBOURS), _given(environment, PROCESS_ID)
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        local_size, local_rank = "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"
        return _given(environment, local_size), _given(environment, local_rank)
    return None, None


def _number(name: str, text: str | None) -> int:
    if text is None or not text.isdecimal():
        raise ConfigError(name, text, "must be a whole number of at least 0")
    return int(text)


def _given(environment: Mapping[str, str], name: str, unset: str | None = None) -> int:
    """The whole number that a scheduler has left in a variable."""
    text = environment.get(name, unset)
    if text is None or not text.isdecimal():
        rule = "must be a whole number, as its scheduler sets it"
        raise ConfigError(name, "(nothing)" if text is None else shown(text), rule)
    return int(text)


def slurm_place(environment: Mapping[str, str]) -> Place | None:
    """The place of a process that `srun` started beside others; None for all else.

    The shell of an allocation has the job's variables too, but only `srun` gives a process its number.
    """
    if "SLURM_STEP_ID" not in environment or _given(environment, "SLURM_NTASKS", "1") < 2:
        return None
    # Such as node1, node1,node7 or node[001-004,7],other: the first one holds process 0.
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    match = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", nodes)
    if match is None:
        raise ConfigError(
            "SLURM_STEP_NODELIST", shown(nodes), "must be the nodes of the step, as srun sets it"
        )
    # Steps of one job may run side by side.
    number = _given(environment, "SLURM_JOB_ID") + 61 * _given(environment, "SLURM_STEP_ID")
    # Such as 2(x3),1: nodes 0 to 2 have two processes, node 3 has one.
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts: list[int] = []
    for count, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(repeated or 1)
    node = _given(environment, "SLURM_NODEID")
    if node >= len(counts):
        rule = f"must say how many tasks node {node} has, as srun sets it"
        raise ConfigError("SLURM_STEP_TASKS_PER_NODE", shown(tasks), rule)
    return Place(
        f"{match[1]}{match[2] or ''}:{_FIRST_PORT + number % _PORTS}",
        _given(environment, "SLURM_NTASKS"),
        _given(environment, "SLURM_PROCID"),
        counts[node],
        _given(environment, "SLURM_LOCALID"),
    )


def open_mpi_place(environment: Mapping[str, str]) -> Place | None:
    """The place of a process that Open MPI's `mpirun` started beside others; None for all else.

    Process 0 is looked for where `mpirun` runs. Open MPI 4 says the address of that node, Open MPI 5 its name.
    """
    if _given(environment, "OMPI_COMM_WORLD_SIZE", "1") < 2:
        return None
    four = re.match(
        r"(\d+)\.\d+;tcp6?://\[?([^,;\]]+?)(?=[,;\]]|:\d+(?:;|$))",
        environment.get("OMPI_MCA_orte_hnp_uri", ""),
    )
    five = re.match(r"prterun-(.+)-(\d+)@\d+$", environment.get("PMIX_NAMESPACE", ""))
    if four:
        host, number = four[2], int(four[1]) // 2**12  # a job's number counts in steps of 2^12
    elif five:
        host, number = five[1], int(five[2])
    else:
        rule = "Open MPI started several processes, but does not say where process 0 is; say it"
        raise ConfigError("--coordinator", "(nothing)", rule)
    return Place(
        f"[{host}]:{_FIRST_PORT + number % _PORTS}"
        if ":" in host
        else f"{host}:{_FIRST_PORT + number % _PORTS}",
        _given(environment, "OMPI_COMM_WORLD_SIZE"),
        _given(environment, "OMPI_COMM_WORLD_RANK"),
        _given(environment, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        _given(environment, "OMPI_COMM_WORLD_LOCAL_RANK"),
    )


def gpu_of(place: Place, environment: Mapping[str, str] = os.environ) -> int | None:
    """The one GPU of a process that has neighbours on its node; None: all GPUs it sees are its own.

    Raises:
      ConfigError: the scheduler shows each process a GPU of its own only.
    """
    if place.local_id is None or place.neighbours in (None, 1):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible and len(visible.split(",")) < (place.neighbours or 1):
        rule = (
            f"process {place.process_id} must see the GPUs of its {place.neighbours} neighbours on the node, or they "
            "cannot exchange rows: under Slurm give --gpus-per-node, never --gpus-per-task or --gpu-bind"
        )
        raise ConfigError("CUDA_VISIBLE_DEVICES", shown(visible), rule)
    return place.local_id


def promised_devices(environment: Mapping[str, str] = os.environ) -> int | None:
    """Devices that this process was promised by `moejax launch`; None where nothing was promised."""
    text = environment.get(DEVICES, "")
    return int(text) if text.isdecimal() else None
