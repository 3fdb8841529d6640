"""Runs in processes of their own, for tests: started, waited for, looked at."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import time

from tests.train import small

COMMAND = (sys.executable, "-m", "train")


def write_config(folder, **fields):
    """The small run on a text of its own, as a config file."""
    base = small.config()
    data = dataclasses.replace(base.data, path=str(small.write_text(folder / "text.txt")))
    return small.write_config(folder / "small.py", dataclasses.replace(base, data=data, **fields))


# A step as slow as one of a real model: what a test does at some step must reach the run before it has ended.
PACED = """
import time
from train.data import batches

take = batches.TrainingBatches.__next__
batches.TrainingBatches.__next__ = lambda self: time.sleep(0.25) or take(self)

"""


def paced(config):
    """The same run, by a config file of its own, with steps of a quarter of a second."""
    slow = config.with_name(f"paced_{config.name}")
    slow.write_text(PACED + config.read_text())
    return slow


def start(*words, command=COMMAND, env=None):
    return subprocess.Popen(
        [*command, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | (env or {}),
    )


def run(*words, code=0, command=COMMAND, env=None, timeout=480):
    """The output of a command that must end with this code."""
    process = start(*words, command=command, env=env)
    output = process.communicate(timeout=timeout)[0]
    assert process.returncode == code, output
    return output


def launched(processes, devices, config, workdir, *options):
    """The words of a run in so many processes of so many devices."""
    how = ("launch", "--processes", processes, "--devices-per-process", devices)
    return (*how, "train", config, "--workdir", workdir, *options)


def wait_for_step(workdir, step, process):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"step {step} was never reached: {process.communicate()[0]}")


def children(process):
    """The ids of the processes that a launcher has started, by their number in the run."""
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    numbers = {int(pid): _number_in_run(pid) for pid in found.stdout.split()}
    return sorted((pid for pid in numbers if numbers[pid] is not None), key=numbers.get)


def _number_in_run(pid):
    """None: not a process of the run, or not yet."""
    variables = pathlib.Path(f"/proc/{pid}/environ").read_text().split("\0")
    found = [int(text.partition("=")[2]) for text in variables if text.startswith("MOEJAX_PROCESS_ID=")]
    return found[0] if found else None


def has_state(pid, state):
    """Whether a process is in a state such as T (stopped); one that is not there is a zombie (Z)."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == state
    except (FileNotFoundError, ProcessLookupError):
        return state == "Z"


def is_gone(pid):
    """Whether a process has ended, even if nobody has asked how."""
    return has_state(pid, "Z")


def wait_until(is_so, seconds=60):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
