"""A run's directory: one run each, and found out before the first step whether it can hold a checkpoint."""

import collections
import os
import pathlib
import resource

import pytest

from train.errors import ConfigError
from train.workdir import Workdir

Usage = collections.namedtuple("Usage", "free")


def made(folder):
    workdir = Workdir(str(folder), "x")
    workdir.make()
    return workdir


def refused(workdir, state_bytes=10):
    with pytest.raises(ConfigError) as caught:
        workdir.require_room(state_bytes, 12)
    assert caught.value.field == "workdir"
    return caught.value.rule


def test_runs_of_the_same_second_get_a_directory_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    workdirs = [Workdir(None, "x") for _ in range(3)]
    for workdir in workdirs:
        workdir.path = pathlib.Path("runs/x-now")
        assert workdir.is_new
        workdir.make()
        assert not workdir.is_new, "the next attempt of a run goes on in it"
        workdir.make()
    names = ["runs/x-now", "runs/x-now-2", "runs/x-now-3"]
    assert [str(workdir.path) for workdir in workdirs] == names
    assert all(pathlib.Path(name).is_dir() for name in names)


def test_a_directory_that_the_user_names_may_be_there(tmp_path):
    assert not Workdir(str(tmp_path), "x").is_new
    assert made(tmp_path).path == tmp_path
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be created: Not a directory"):
        Workdir(str(tmp_path / "file" / "below"), "x").make()


def test_a_checkpoint_fits_and_nothing_is_left_of_the_trial(tmp_path):
    workdir = made(tmp_path / "a" / "b")
    workdir.require_room(1000, 12)
    assert list(workdir.path.iterdir()) == []
    (workdir.path / "checkpoints" / "3").mkdir(parents=True)
    workdir.require_room(1000, 12)
    assert [path.name for path in workdir.path.rglob("*")] == ["checkpoints", "3"]


def test_no_room(tmp_path, monkeypatch, caplog):
    workdir = made(tmp_path / "a" / "b")
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(free=2_000_000))
    workdir.require_room(2_000_000, 12)
    assert caplog.messages == []
    workdir.require_room(8_000_000, 12)  # it may fit: a checkpoint is compressed
    rule = "room for a checkpoint of 8.0 MB on its disk, free are only 2.0 MB"
    assert caplog.messages == [f"workdir = {workdir.path}: has hardly {rule}"]
    assert refused(workdir, 8_100_000) == f"has no {rule.replace('8.0', '8.1')}"
    assert list(tmp_path.iterdir()) == [], "what was made for it is gone"
    workdir = made(tmp_path / "c")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    assert "(ulimit -f), which is 0.0 MB" in refused(workdir, 1_000_000)


def test_room_is_looked_for_where_the_checkpoints_lie(tmp_path, monkeypatch):
    workdir, large = made(tmp_path / "a"), tmp_path / "large"
    large.mkdir()
    (workdir.path / "checkpoints").symlink_to(large)
    free = lambda path: 10**9 if pathlib.Path(path).resolve() == large else 10  # noqa: E731
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(free=free(path)))
    workdir.require_room(10**9, 12)
    assert list(large.iterdir()) == []


def test_a_file_in_the_way(tmp_path):
    workdir = made(tmp_path / "a")
    (workdir.path / "checkpoints").write_text("mine")
    assert refused(workdir).startswith(f"cannot hold a run: {workdir.path / 'checkpoints'}")
    assert (workdir.path / "checkpoints").read_text() == "mine"


FILES = (
    "metrics.jsonl",
    "metrics.jsonl.cut",
    "log.txt",
    "config.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
)
SCRATCH = ("config.yaml.new", "tokenizer.json.new", "tokenizer_config.json.new")
FOLDERS = ("checkpoints", "logs", "tensorboard")


@pytest.mark.parametrize("name", [*FILES, *SCRATCH, *FOLDERS])
def test_what_is_in_the_way_of_a_file_of_a_run(tmp_path, name):
    path = made(tmp_path).path / name
    is_folder = name in FOLDERS
    path.write_text("mine") if is_folder else path.mkdir()
    with pytest.raises(ConfigError) as caught:
        Workdir(str(tmp_path), "x").require_places(tensorboard=True)
    reason = "File exists" if is_folder else "Is a directory"
    cure = "move it away, or choose another workdir"
    assert str(caught.value) == f"workdir = {tmp_path}: cannot hold a run: {path}: {reason}; {cure}"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_pipes_and_links_among_the_files_of_a_run(tmp_path):
    workdir = made(tmp_path / "a")
    os.mkfifo(workdir.path / "log.txt")
    with pytest.raises(ConfigError, match=r"log\.txt: a named pipe, not a file; move it away"):
        workdir.require_places(tensorboard=True)
    (workdir.path / "log.txt").unlink()
    (workdir.path / "log.txt").symlink_to(tmp_path / "none" / "log.txt")
    with pytest.raises(ConfigError, match=r"log\.txt: No such file or directory; move it away"):
        workdir.require_places(tensorboard=True)
    (tmp_path / "none").mkdir()
    (workdir.path / "tensorboard").write_text("mine")
    workdir.require_places(tensorboard=False)  # the run does not write there
    assert list((tmp_path / "none").iterdir()) == []
    (workdir.path / "log.txt").write_text("earlier")
    workdir.require_places(tensorboard=False)
    assert (workdir.path / "log.txt").read_text() == "earlier"
    assert sorted(path.name for path in workdir.path.iterdir()) == ["log.txt", "tensorboard"]


def test_a_path_that_is_too_long_for_what_comes_below_it(tmp_path):
    folder = tmp_path
    while len(str(folder)) < 4000:
        folder = folder / ("d" * min(200, 4020 - len(str(folder))))
    assert refused(made(folder)).endswith(": File name too long; choose another workdir")
    assert list(tmp_path.iterdir()) == []


def test_no_file_is_made_for_a_trial(tmp_path, monkeypatch):
    """Who waits for the run's metrics would see them come and go."""

    def refused(*_):
        raise AssertionError("a file is made")

    directory = Workdir(str(tmp_path / "run"), "small")
    directory.make()
    monkeypatch.setattr("train.workdir._try_file", refused)
    directory.require_places(tensorboard=True)
