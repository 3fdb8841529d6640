"""A real Slurm on this machine, for one test or one command: munge, controller and one node, all files in one folder.

python -m tests.train.slurm srun -n 2 moejax train quickstart --workdir runs/slurm --cpu-devices 1
"""

import contextlib
import os
import pathlib
import secrets
import socket
import subprocess
import sys
import tempfile
import time

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")

CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@contextlib.contextmanager
def slurm(folder: pathlib.Path):
    """A running Slurm whose commands need the environment that is given: `{"SLURM_CONF": ...}`."""
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    for place in (folder, *folder.parents):  # munged insists that its socket can be reached by all
        with contextlib.suppress(PermissionError):
            place.chmod(place.stat().st_mode | 0o011)
    key, conf = folder / "munge.key", folder / "slurm.conf"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    ports = [free_port(), free_port()]
    conf.write_text(CONFIG.format(folder=folder, host=host, user="root", controller=ports[0], node=ports[1]))
    env = {"SLURM_CONF": str(conf)}
    files = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "log-file")]
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--seed-file={folder}/seed", *files]
    with contextlib.ExitStack() as stack:
        for command in (munged, ["slurmctld", "-D", "-f", conf], ["slurmd", "-D", "-f", conf]):
            stack.enter_context(running(command, env, folder / f"{command[0]}.out"))
            if command is munged:
                wait_until((folder / "munge.socket").exists)
        wait_until(lambda: "idle" in answer(["sinfo", "-h", "-o", "%T"], env))
        yield env


@contextlib.contextmanager
def running(command, env, output):
    with output.open("w") as file:
        process = subprocess.Popen(command, env=os.environ | env, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def answer(command, env):
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True).stdout


def wait_until(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "Slurm does not come up"
        time.sleep(0.1)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, slurm(pathlib.Path(place)) as variables:
        sys.exit(subprocess.run(sys.argv[1:], env=os.environ | variables).returncode)
