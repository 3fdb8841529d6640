"""Paths as a user writes them: `~`, and names in another encoding."""

import dataclasses
import pathlib
import sys

import pytest

from train.cli import main
from train.config import DataConfig, TrainConfig
from train.errors import ConfigError
from train.inputs import read_inputs
from train.launch import _log_folder
from train.paths import expanded, with_home
from train.validation import validate
from train.workdir import Workdir


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_home_is_put_in(home):
    assert expanded("workdir", "~/x") == home / "x"
    assert expanded("workdir", "a/~") == pathlib.Path("a/~")
    assert expanded("workdir", "./~nobody-of-this-name") == pathlib.Path("./~nobody-of-this-name")
    assert Workdir("~/x", "name").path == home / "x"
    assert _log_folder(["train", "x", "--workdir=y", "--workdir=~/x"]) == home / "x" / "logs"


def test_where_processes_log(home):
    config = home / "mine.py"
    assert _log_folder(["train", str(config)]) is _log_folder(["train"]) is None, "not in the current folder"
    config.write_text(
        "from train.config import *\ndef config():\n    return TrainConfig(workdir='~/there')\n"
    )
    assert _log_folder(["train", str(config)]) == home / "there" / "logs"
    assert _log_folder(["train", str(config), "--workdir", "here"]) == pathlib.Path("here/logs")


def test_a_home_that_nobody_knows():
    validate(dataclasses.replace(TrainConfig(), workdir="~nobody-of-this-name/x"), 1)  # does not trip over it
    with pytest.raises(ConfigError) as caught:
        expanded("workdir", "~nobody-of-this-name/x")
    assert str(caught.value) == (
        "workdir = ~nobody-of-this-name/x: begins with ~nobody-of-this-name, but no home is known for it; "
        "write ./~nobody-of-this-name for a folder of that name"
    )


def test_an_empty_home_is_none(home, monkeypatch, capsys):
    (home / "there.py").write_text("")
    monkeypatch.setenv("HOME", "")
    for text in ("~", "~/x"):
        with pytest.raises(
            ConfigError, match=f"^workdir = {text}: begins with ~, but no home is known for it"
        ):
            expanded("workdir", text)
        assert with_home(text) == text
    at_the_root = f"~{home}/there.py"  # what an empty HOME would make of it is a file
    assert main(["train", at_the_root]) == 2
    assert f"CONFIG = {at_the_root}: no such config file" in capsys.readouterr().err
    for field, data in (
        ("path", DataConfig(path=at_the_root)),
        ("tokenizer", DataConfig(tokenizer=at_the_root)),
    ):
        with pytest.raises(ConfigError, match=rf"^data\.{field} = ~.*: no such file"):
            read_inputs(dataclasses.replace(TrainConfig(), data=data), home / "run", None, None)


@pytest.mark.parametrize(
    ("encoding", "text", "rule"),
    [
        ("ascii", "caf\udcc3\udca9", "but this process reads names as ascii; set LC_ALL"),
        ("latin-1", "cafÃ©", "but this process reads names as latin-1; set LC_ALL"),
        ("utf-8", "caf\udce9", "but has other bytes; choose another name"),
    ],
)
def test_a_name_that_is_no_utf8(monkeypatch, encoding, text, rule):
    expanded("RUN", "café")
    monkeypatch.setattr("os.fsencode", lambda name: str(name).encode(encoding, "surrogateescape"))
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: encoding)
    with pytest.raises(ConfigError, match=f"^RUN = .*: must be UTF-8, {rule}"):
        expanded("RUN", text)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("eval ~/none", "RUN = HOME/none: no such run directory"),
        ("train ~/none.py", "CONFIG = ~/none.py: no such config file"),
        ("report ~nobody-of-this-name/x", "RUN = ~nobody-of-this-name/x: begins with"),
        ("report ~/run --output=~nobody-of-this-name/x", "--output = ~nobody-of-this-name/x: begins with"),
        (
            "export ~/run --layer=0 --output=~nobody-of-this-name/x",
            "--output = ~nobody-of-this-name/x: begins",
        ),
    ],
)
def test_commands(home, capsys, line, named):
    (home / "run").mkdir()
    (home / "run" / "config.yaml").write_text("steps: 1")
    (home / "there.py").write_text("")
    assert main(line.split()) == 2
    assert capsys.readouterr().err.startswith(f"error: {named.replace('HOME', str(home))}")
    assert main(["train", "~/there.py"]) == 2
    assert "has no function `config()" in capsys.readouterr().err
