"""Disks that fill up, cannot be written to, or are slow, and clocks that jump: the last good state is intact."""

import os
import re
import subprocess

import pytest

from tests.train import launching, small

pytestmark = pytest.mark.slow


@pytest.fixture
def disk(tmp_path):
    """`remount(options)` of a small file system of its own; its folder is `remount.folder`."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*words):
        subprocess.run(["mount", *words, folder], check=True, capture_output=True)

    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    try:
        mount("-t", "tmpfs", "-o", "size=12m", "tmpfs")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {error}")
    remount = lambda options: mount("-o", f"remount,{options}")  # noqa: E731
    remount.folder = folder
    yield remount
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_and_one_that_cannot_be_written_to(tmp_path, disk):
    config, workdir = launching.write_config(tmp_path), disk.folder / "run"
    words = ("train", config, "--cpu-devices", 2, "--workdir", workdir, "--model.moe.d_hidden", 512)
    disk("ro")
    output = launching.run(*words, code=2)
    assert re.search(r"^error: workdir = .*: cannot be created: Read-only file system$", output, re.M), output
    disk("rw")
    output = launching.run(*words, code=3)  # each of its checkpoints takes 5 MB
    assert re.search(r"^error: the checkpoint of step 12 .*No space left", output, re.M), output
    assert "Traceback" not in output, output
    assert (workdir / "checkpoints" / "10").is_dir()
    disk("ro")
    output = launching.run(*words, code=2)
    assert re.search(
        r"^error: workdir = .*Read-only file system; move it away, or choose another workdir$", output, re.M
    ), output
    disk("rw,size=64m")
    assert "going on after step 10" in launching.run(*words)
    assert [line["step"] for line in small.read_metrics(workdir) if "loss" in line] == [*range(1, 13)]


SLOW = """
import time
from train import checkpoint

write = checkpoint.write_manifest
checkpoint.write_manifest = lambda *arguments: time.sleep(2) or write(*arguments)

"""
# Orbax counts a write's time by this clock: what its threads say to each other it gives up after ten minutes.
JUMPING = """
import itertools
import time

jumps = itertools.cycle([0, 120, -120])
now = time.time
time.time = lambda: now() + next(jumps)

"""


@pytest.mark.parametrize("trouble", [SLOW, JUMPING], ids=["slow file system", "clock that jumps"])
def test_what_a_run_must_not_mind(tmp_path, trouble):
    config = launching.write_config(tmp_path)
    options = ("--cpu-devices", 2, "--eval.every", 6, "--log.tensorboard", "true")
    launching.run("train", config, "--workdir", tmp_path / "sound", *options)
    troubled = config.with_name("troubled.py")
    troubled.write_text(trouble + config.read_text())
    launching.run("train", troubled, "--workdir", tmp_path / "troubled", *options)
    assert small.read_metrics(tmp_path / "troubled") == small.read_metrics(tmp_path / "sound")
    kept = [
        sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir())
        for run in ("sound", "troubled")
    ]
    assert kept[0] == kept[1]
