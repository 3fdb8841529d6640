"""A disk that never answers holds no process for ever, whatever the run closes there."""

import pytest

from tests.train import launching

STUCK = """
import time
from train import checkpoint, ending, monitor, tensorboard

def never(*_):
    time.sleep(3600)

tensorboard.Board.close = never
"""
WRITING = "checkpoint.write_manifest, checkpoint.SAVE_SECONDS, ending.ENDING_SECONDS = never, 1, 1\n"
BEGINNING = "checkpoint.Checkpoints._sweep, checkpoint.SAVE_SECONDS = never, 1\n"
CLOSING = "monitor.CLOSE_SECONDS = 1\n"


@pytest.mark.parametrize(
    ("where", "line"),
    [
        (WRITING, "the checkpoint of step 5 could not be written: its files have not grown for 1 s; look at"),
        (
            BEGINNING,
            "the checkpoint of step 5 could not be written: its files have not grown for 1 s; look at",
        ),
        (CLOSING, "the files in WORKDIR could not be closed within 1 s; look at the disk"),
    ],
    ids=["while a checkpoint is written", "before it is begun", "at the end of the run"],
)
def test_a_stuck_disk_ends_the_process(tmp_path, where, line):
    config = launching.write_config(tmp_path)
    config.write_text(STUCK + where + config.read_text())
    workdir = tmp_path / "run"
    options = ("--cpu-devices", 1, "--log.tensorboard", "true", "--workdir", workdir)
    output = launching.run("train", config, *options, code=3, timeout=120)
    (error,) = [text for text in output.splitlines() if text.startswith("error: ")]
    assert error.startswith(f"error: {line.replace('WORKDIR', str(workdir))}")
