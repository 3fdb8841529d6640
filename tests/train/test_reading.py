"""Whatever a reader raises becomes one line that names field and file; what is no fault of the file passes."""

import errno
import os

import pytest

from train.errors import ConfigError, TrainingFailed, one_line
from train.reading import beside, reading, regular
from train.strays import is_stray


class PanicException(BaseException):
    """Named like the one that stands for a panic in Rust."""


@pytest.mark.parametrize(
    ("error", "rule"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot be read: No space left on device"),
        (ValueError("line one\nline two"), "is not a list: line one"),
        (RuntimeError(), "is not a list: RuntimeError"),
        (KeyError("text"), "is not a list: it has no 'text'"),
        (RecursionError("deep"), "is not a list: it is nested too deeply"),
        (PanicException("index out of bounds"), "is not a list: index out of bounds"),
        (ValueError("x" * 5000), "is not a list: " + "x" * 200 + "…"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_what_a_reader_raises_is_one_line(error, rule):
    with pytest.raises(ConfigError) as caught, reading("data.path", "a.txt", "a list"):
        raise error
    assert str(caught.value) == f"data.path = a.txt: {rule}" and caught.value.__cause__ is error


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt(), SystemExit(1), TrainingFailed("full")])
def test_what_is_no_fault_of_the_file_passes(error):
    with pytest.raises(type(error)) as caught, reading("data.path", "a.txt", "a list"):
        raise error
    assert caught.value is error


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    assert regular(tmp_path / "file") == tmp_path / "file"
    for path, rule in (
        (tmp_path, "Is a directory"),
        (tmp_path / "pipe", "a named pipe, not a file"),
        ("/dev/zero", "a device, not a file"),
        (tmp_path / "none", "No such file or directory"),
        ("x" * 5000, "File name too long"),
    ):
        with pytest.raises(ConfigError, match=rf"cannot be read: {rule}$"), reading("CONFIG", path, "a file"):
            regular(path)
    assert beside("x/" * 5000, "*") == beside("a\0b/c", "*") == []


def test_values_are_shown_in_one_line():
    assert one_line("a\n b", 9) == "a b" and one_line("", 9) == "''" and one_line("abc", 2) == "ab…"
    assert one_line([10**5000], 9) == "(list)", "Python does not write it out"


def test_strays():
    assert all(map(is_stray, (".DS_Store", ".nfs01", "._x", "Thumbs.db", "desktop.ini", "lost+found")))
    assert not any(map(is_stray, ("d", "x.txt", "manifest.ocdbt", "0", "thumbs")))
