"""Real schedulers from Debian's packages start the same run as `moejax launch`, with the same numbers."""

import os
import shutil
import signal
import subprocess

import pytest

from tests import tolerance
from tests.train import launching, slurm, small

pytestmark = pytest.mark.slow

OPTIONS = ("--steps", 50, "--mesh.expert", 2, "--checkpoint.every", 25, "--cpu-devices")


def have(*programs):
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(
        bool(missing) or os.geteuid() != 0,
        reason=f"needs root and {', '.join(missing) or 'nothing else'}; .ci/all installs them",
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folder, config, and the metrics of the run in one process."""
    folder = tmp_path_factory.mktemp("schedulers")
    config = launching.write_config(folder)
    launching.run("train", config, "--workdir", folder / "one", *OPTIONS, 4)
    return folder, config, small.read_metrics(folder / "one")


def assert_as_in_one_process(workdir, one):
    lines = small.read_metrics(workdir)
    assert [line["step"] for line in lines] == [line["step"] for line in one]
    for expected, actual in zip(one, lines, strict=True):
        for name in {"loss", "aux_loss", "eval/loss"} & set(expected):
            tolerance.assert_close(
                actual[name], expected[name], tolerance.F32_MODEL, f"{name} of step {expected['step']}"
            )


@have(*slurm.PROGRAMS)
def test_slurm(place, tmp_path):
    folder, config, one = place
    words = ("train", config, "--workdir", folder / "slurm", *OPTIONS, 2)
    srun = ("srun", "-n", "2", *launching.COMMAND)
    paced = ("train", launching.paced(config), *words[2:])
    with slurm.slurm(tmp_path) as env:
        process = launching.start(*paced, command=srun, env=env)
        launching.wait_for_step(folder / "slurm", 8, process)
        # As `--signal=USR1@120` does before the time limit.
        job = slurm.answer(["squeue", "-h", "-o", "%A"], env).strip()
        subprocess.run(["scancel", "--signal=USR1", job], env=os.environ | env, check=True)
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 143 and "stopped by signal 15" in output, output
        output = launching.run(*words, command=srun, env=env)
    assert "going on after step" in output and "self-check: expert all-to-all" in output
    assert_as_in_one_process(folder / "slurm", one)


@have("mpirun")
def test_open_mpi(place):
    folder, config, one = place
    words = ("train", config, "--workdir", folder / "mpi", *OPTIONS, 2)
    mpirun = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", *launching.COMMAND)
    process = launching.start("train", launching.paced(config), *words[2:], command=mpirun)
    launching.wait_for_step(folder / "mpi", 8, process)
    process.send_signal(signal.SIGUSR1)  # SIGTERM makes mpirun kill its processes within a second
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 143 and "stopped by signal 15" in output, output
    output = launching.run(*words, command=mpirun)
    assert "going on after step" in output and "self-check: expert all-to-all" in output
    assert_as_in_one_process(folder / "mpi", one)
