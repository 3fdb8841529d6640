"""What several files of tests of whole runs share."""

import dataclasses

import pytest

from tests.train import small
from train import cli


@pytest.fixture
def run(tmp_path):
    """`run(*options) -> exit code` of the small run on eight devices; its directory is `run.workdir`."""
    text = small.write_text(tmp_path / "text.txt")
    base = small.config()
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, path=str(text)))
    path = small.write_config(tmp_path / "small.py", base)

    def start(*options):
        return cli.main(["train", str(path), "--workdir", str(start.workdir), *map(str, options)])

    start.workdir, start.config, start.text = tmp_path / "run", path, text
    return start
