"""The templates in launch/: they can be read by what they are for, and their names fit together."""

import os
import pathlib
import shlex
import subprocess

import pytest
import yaml

from train import joining
from train.config_io import find_config
from train.errors import ConfigError
from train.place import Place, find_place
from train.words import Words, take_apart

FOLDER = pathlib.Path(__file__).parents[2] / "launch"
pytestmark = pytest.mark.repo


@pytest.mark.parametrize("name", ["slurm.sbatch", "mpirun.sh", "jobset.yaml"])
def test_a_template_is_short_and_marks_what_must_be_changed(name):
    lines = (FOLDER / name).read_text().splitlines()
    assert len(lines) <= 40 and any("CHANGE: " in line for line in lines)
    if not name.endswith("yaml"):
        subprocess.run(["bash", "-n", FOLDER / name], check=True)


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, None, False), (2, None, False), (1, None, False), (143, None, True), (143, 99, True)]
    + [(code, *rest) for code in (3, 134, 137) for rest in ((None, True), (9, True), (10, False))],
)
def test_slurm_starts_a_job_again_that_was_stopped_or_lost_a_process(tmp_path, code, restarts, requeued):
    (tmp_path / "srun").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/started\nexit {code}\n')
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o700)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "SLURM_JOB_ID": "7"}
    env |= {} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)}
    assert subprocess.run(["bash", FOLDER / "slurm.sbatch"], env=env).returncode == code
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else None) == ("requeue 7\n" if requeued else None)
    *options, command = (tmp_path / "started").read_text().split(" moejax train ")
    assert options == ["--kill-on-bad-exit=0 --wait=200"] and find_config(command.split()[0])
    assert joining.CONNECT_SECONDS < 200, "a process that waits in vain says so itself"


def test_the_jobset_starts_one_process_per_pod_and_names_the_first_ones_host():
    jobset = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, (jobs,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert jobs["replicas"] == 1 and job["backoffLimit"] == 0, "JobSet starts all again, not Job one"
    assert pod["restartPolicy"] == "Never" and jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert {mount["name"] for mount in container["volumeMounts"]} == {one["name"] for one in pod["volumes"]}

    # A Job that fails by its policy does so for this reason; each list is one rule, and none else is there.
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    bad_input = {"containerName": container["name"], "operator": "In", "values": [ConfigError.exit_code]}
    assert job["podFailurePolicy"]["rules"] == [{"action": "FailJob", "onExitCodes": bad_input}]

    (line,) = container["args"]
    assert container["command"] == ["bash", "-c"] and line.startswith("exec moejax ")
    words = Words()
    take_apart(shlex.split(line.replace("$JOB_COMPLETION_INDEX", "1"))[2:], words)
    assert words.arguments[0] == "train" and find_config(words.arguments[1])
    assert words.options["workdir"].startswith(container["volumeMounts"][0]["mountPath"])
    # JobSet's name of a pod: set, job, number of the job, number of the pod, in the set's own domain.
    host = f"{name}-{jobs['name']}-0-0.{name}"
    address = words.options["coordinator"]
    assert address.startswith(f"{host}:")
    assert find_place(words.options, {}) == Place(address, job["parallelism"], 1, None, None, address)
    assert job["parallelism"] == job["completions"]
