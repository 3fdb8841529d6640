"""What a run refuses to begin with, and that it leaves everything as it was."""

import dataclasses
import json
import os

import pytest

from train import cli
from train.config_io import find_config, save_config


@pytest.mark.landing
def test_another_tokenizer_under_the_same_name_is_refused(run, capsys, tmp_path):
    path = tmp_path / "mine.json"
    characters = sorted(set(run.text.read_text()))
    path.write_text(json.dumps({"moejax_tokenizer": "char", "characters": "".join(characters)}))
    assert run("--steps", 2, "--data.tokenizer", path) == 0
    path.write_text(json.dumps({"moejax_tokenizer": "char", "characters": "".join([*characters, "%"])}))
    assert run("--steps", 4, "--data.tokenizer", path) == 2
    assert "error: data.tokenizer = " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--seed", 1, "seed"),
        ("--model.d_model", 32, "model.d_model"),
        ("--data.batch_size", 16, "data.batch_size"),
    ],
)
def test_another_run_in_the_same_workdir_is_refused(run, capsys, option, value, named):
    (run.workdir).mkdir()

    config = dataclasses.replace(find_config(str(run.config))[0], workdir=str(run.workdir))
    save_config(config, run.workdir / "config.yaml")
    assert run(option, value) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: workdir = ") and named in lines[0]
    assert not (run.workdir / "metrics.jsonl").exists()


@pytest.mark.landing
def test_a_refused_resume_leaves_the_run_as_it_was(run, capsys):
    assert run("--steps", 6) == 0
    files = {
        path: path.read_bytes() for path in run.workdir.rglob("*") if path.is_file() and path.name != ".lock"
    }
    assert run("--steps", 4) == 2
    assert "error: steps = 4: must be at least 6" in capsys.readouterr().err
    run.text.write_text(run.text.read_text().replace("quick", "qu1ck"))
    assert run("--steps", 8) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: data.path = "), lines
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_workdir_that_cannot_be_made_is_bad_input(run, capsys):
    run.workdir = run.workdir.with_name("file") / "below"
    run.workdir.parent.write_text("in the way")
    assert run() == 2
    assert capsys.readouterr().err.startswith("error: workdir = ")


@pytest.mark.parametrize("name", [".lock", "config.yaml", "tokenizer.json", "metrics.jsonl"])
def test_a_workdir_with_something_in_the_way_is_bad_input(run, capsys, name):
    (run.workdir / name).mkdir(parents=True)
    assert run() == 2
    path, cure = run.workdir / name, "move it away, or choose another workdir"
    line = f"error: workdir = {run.workdir}: cannot hold a run: {path}: Is a directory; {cure}\n"
    assert capsys.readouterr().err == line
    assert {path.name for path in run.workdir.iterdir()} <= {name, ".lock"}


def test_a_workdir_that_cannot_hold_a_checkpoint_is_bad_input(run, capsys):
    run.workdir.mkdir()
    (run.workdir / "checkpoints").write_text("mine")
    assert run() == 2
    error = capsys.readouterr().err
    where = run.workdir / "checkpoints"
    assert error.startswith(f"error: workdir = {run.workdir}: cannot hold a run: {where}")
    assert error.endswith(": File exists; move it away, or choose another workdir\n")
    assert error.count("\n") == 1
    assert sorted(path.name for path in run.workdir.iterdir()) == [".lock", "checkpoints"]


@pytest.mark.parametrize(
    "words",
    [
        ("train", "PATH"),
        *(
            ("train", "quickstart", f"--data.{name}", "PATH")
            for name in ("path", "validation_path", "tokenizer")
        ),
        ("train", "quickstart", "--workdir", "PATH"),
        ("eval", "PATH"),
        ("report", "PATH"),
        ("generate", "PATH", "--prompt", "a"),
        ("export", "PATH", "--layer", "0", "--output", "new"),
    ],
    ids=" ".join,
)
def test_paths_that_are_no_files(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a b " * 99)
    os.mkfifo(tmp_path / "pipe.txt")  # to open one would wait for ever
    os.symlink("loop", tmp_path / "loop")
    for path in (
        "x" * 5000,
        "x/" * 2500,
        "~nosuchuser/a",
        "pipe.txt/b",
        "loop",
        "a\0b",
        "pipe.txt",
        "/dev/zero",
    ):
        given = [path if word == "PATH" else word for word in words]
        data = [] if "--data.path" in words or words[0] != "train" else ["--data.path", "text.txt"]
        small = (
            ["--model.d_model", "16", "--model.num_layers", "1", "--steps", "1"]
            if words[0] == "train"
            else []
        )
        assert cli.main([*given, *data, *small]) == 2, path
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and len(line) < 1000
        if path == "~nosuchuser/a" and "--workdir" in words:
            assert "no home is known for it" in line


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--data.path", "missing.txt"),
        ("--data.sequence_length", 100000),
        ("--data.batch_size", 12),
        ("--mesh.expert", 3),
        ("--model.moe.top_k", 999),
        ("--model.vocab_size", 5),
    ],
)
def test_bad_input_writes_nothing(run, capsys, option, value):
    assert run(option, value) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {option[2:]} = {value}: "), lines
    assert not run.workdir.exists()
