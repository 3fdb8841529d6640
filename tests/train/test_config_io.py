import dataclasses
import importlib.metadata
import os
import sys

import hypothesis
import pytest
from hypothesis import strategies as st

from train import config_io
from train.config import MeshConfig, MoEConfig, TrainConfig
from train.config_io import (
    differing_fields,
    earlier_config,
    find_config,
    load_config,
    load_python,
    naming_versions,
    refuse_other_run,
    save_config,
    shipped_names,
    version_in,
)
from train.errors import ConfigError
from train.fields import _replace, flatten, leaf_types


@st.composite
def configs(draw):
    config = TrainConfig()
    for name, annotation in leaf_types(TrainConfig).items():
        values = st.floats(allow_nan=False) if annotation is float else st.from_type(annotation)
        config = _replace(config, name.split("."), draw(values.filter(lambda value: value == value)))
    return config


@hypothesis.settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
)
@hypothesis.given(config=configs())
def test_yaml_gives_back_exactly_what_was_saved(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    save_config(config, path)
    loaded = load_config(path)
    # Where the run lay is not saved.
    expected = dataclasses.replace(config, workdir=None)
    assert loaded == expected
    assert [type(value) for value in flatten(loaded).values()] == [
        type(value) for value in flatten(expected).values()
    ]
    assert os.listdir(path.parent) == ["config.yaml"]


def test_yaml_written_by_hand(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("steps: 7\noptimizer:\n  learning_rate: 1e-3\nmodel: {moe: {top_k: 1}}\n")
    config, name = find_config(str(path))
    assert (config.steps, config.optimizer.learning_rate, config.model.moe.top_k) == (7, 1e-3, 1)
    assert config.data == TrainConfig().data
    assert name == "my"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 7", "stepz = 7: no such field; the nearest is steps"),
        ("model:\n  moe:\n    topk: 2", "model.moe.topk = 2: no such field; the nearest is model.moe.top_k"),
        ("steps: soon", "steps = soon: must be an integer"),
        ("steps: true", "steps = True: must be an integer"),
        ("steps:", "steps = None: must be an integer"),
        ("data: {tokenizer: 5}", "data.tokenizer = 5: must be text"),
        ("model:", "model = None: must be a group of fields"),
        ("- 1", "must be a YAML mapping"),
        ("", "must be a YAML mapping"),
        ("steps: [", "is not valid YAML"),
        ("!!python/object:os.system {}", "is not valid YAML"),
        ("steps: &a 3\nseed: *a", "is not valid YAML: an alias in line 2; write the value itself"),
        ("steps: 3\nsteps: 4", "is not valid YAML: steps is there twice"),
        ("steps: [0x" + "f" * 5000 + "]", "steps = (list): must be an integer"),
        ("a" * 5000 + ": 1", "aaa"),
        ("[" * 5000, "is not valid YAML: it is nested too deeply"),
        ("seed: 2020-99-99", "is not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_config(str(path))
    assert message in str(caught.value)


def test_yaml_as_editors_write_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbfsteps: 7\r\n\r\nseed: 3\r\n\r\n")
    config = load_config(path)
    assert (config.steps, config.seed) == (7, 3)


def test_yaml_that_is_no_utf8(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(b"steps: \xff")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_a_run_lends_its_name_to_its_config(tmp_path):
    (tmp_path / "good-run").mkdir()
    save_config(TrainConfig(steps=3), tmp_path / "good-run" / "config.yaml")
    config, name = find_config(str(tmp_path / "good-run" / "config.yaml"))
    assert (config.steps, name) == (3, "good-run")
    with pytest.raises(ConfigError, match=r"is a run directory; its config is .*good-run/config\.yaml"):
        find_config(str(tmp_path / "good-run"))


PYTHON = "from train.config import *\n\n\ndef config():\n    return "


def test_python_config(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(PYTHON + "TrainConfig(steps=11, optimizer=OptimizerConfig(learning_rate=1))")
    config, name = find_config(str(path))
    assert (config.steps, name) == (11, "mine")
    assert type(config.optimizer.learning_rate) is float
    assert not [module for module in sys.modules if "mine" in module]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "has no function `config() -> TrainConfig`"),
        ("config = 5", "has no function `config() -> TrainConfig`"),
        ("1 / 0", "raised ZeroDivisionError in line 1: division by zero"),
        ("\n\ndef config(:", "raised SyntaxError in line 3: "),
        ("import no_such_module_at_all", "raised ModuleNotFoundError in line 1: No module named"),
        ("raise SystemExit('no')", "raised SystemExit in line 1: no"),
        (PYTHON + "3", "config() must return a TrainConfig, not int"),
        (PYTHON + "TrainConfig(stepz=3)", "raised TypeError in line 5: "),
        (PYTHON + "TrainConfig(stepz=3)", "; the nearest is steps"),
        (PYTHON + "ModelConfig(steps=3)", "; steps is a field of TrainConfig itself"),
        (PYTHON + "TrainConfig(steps='many')", "steps = many: must be an integer"),
        (PYTHON + "TrainConfig(model=MoEConfig())", "model = MoEConfig("),
    ],
)
def test_bad_python_config(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        find_config(str(path))
    assert message in str(caught.value)


def test_the_line_of_an_error_is_named_for_a_relative_path_too(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("\n1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="raised ZeroDivisionError in line 2: division by zero"):
        find_config("mine.py")


def test_shipped_configs_by_name_and_by_path():
    assert {"quickstart", "shakespeare", "moe_1b_64x"} <= set(shipped_names())
    for name in shipped_names():
        config, found = find_config(name)
        assert found == name
        assert config == load_python(config_io.SHIPPED / f"{name}.py")


def test_what_is_there_and_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("fifo.yaml")
    os.symlink("none", "link.py")
    rule = "must be a .py file, a .yaml file, or the name of a shipped config"
    for name, reason in (
        ("fifo.yaml", "a named pipe, not a file"),
        ("link.py", "a link to none, which is not there"),
    ):
        with pytest.raises(ConfigError) as caught:
            find_config(name)
        assert str(caught.value) == f"CONFIG = {name}: cannot be read: {reason}; {rule}"
    with pytest.raises(ConfigError, match=r"fifa\.yaml: no such config file; there are moe_1b_64x"):
        find_config("fifa.yaml")


def test_unknown_config_names_the_nearest(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="quikstart: no such config file; the nearest is quickstart"):
        find_config("quikstart")
    (tmp_path / "mine.py").write_text("")
    with pytest.raises(ConfigError, match=r"the nearest is .*/mine\.py"):
        find_config(str(tmp_path / "mime.py"))
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match=r"must be a \.py file, a \.yaml file"):
        find_config(str(tmp_path / "mine.txt"))
    with pytest.raises(ConfigError, match="no such config file"):
        find_config("x" * 5000 + ".py")


def test_what_may_change_on_resume():
    old = TrainConfig()
    may = dataclasses.replace(
        old,
        steps=7,
        workdir="elsewhere",
        data=dataclasses.replace(old.data, path="moved.txt", tokenizer="moved.json"),
        mesh=MeshConfig(data=2, expert=4),
        log=dataclasses.replace(old.log, every=1),
        eval=dataclasses.replace(old.eval, every=1),
        checkpoint=dataclasses.replace(old.checkpoint, every=1),
        model=dataclasses.replace(old.model, moe=MoEConfig(exchange="all_gather")),
    )
    assert differing_fields(old, may) == {}
    refuse_other_run("runs/x", old, may)


def test_what_may_not_change_on_resume_is_named_with_both_values():
    old = TrainConfig()
    new = dataclasses.replace(old, seed=3, model=dataclasses.replace(old.model, moe=MoEConfig(top_k=2)))
    assert differing_fields(old, new) == {"seed": (0, 3), "model.moe.top_k": (None, 2)}
    with pytest.raises(ConfigError) as caught:
        refuse_other_run("runs/x", old, new)
    assert str(caught.value) == (
        "workdir = runs/x: holds another run: seed (0 there, 3 now), model.moe.top_k (None there, 2 now); "
        "choose another workdir"
    )


def test_checkpoints_of_an_unknown_config_are_not_gone_on_with(tmp_path):
    assert earlier_config(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".DS_Store").touch()
    (tmp_path / "checkpoints" / "7").touch()
    assert earlier_config(tmp_path) is None, "files that are no checkpoint"
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"^workdir = .*: has checkpoints, but not the config\.yaml"):
        earlier_config(tmp_path)
    save_config(dataclasses.replace(TrainConfig(), steps=7, workdir="somewhere"), tmp_path / "config.yaml")
    assert earlier_config(tmp_path) == TrainConfig(steps=7), "where it lay is not part of it"


def test_a_saved_config_says_which_version_wrote_it(tmp_path):
    path = tmp_path / "config.yaml"
    save_config(TrainConfig(steps=3), path)
    ours = importlib.metadata.version("moejax")
    assert path.read_text().startswith(f"moejax: {ours}\nsteps: 3\n")
    written = path.read_text()
    path.write_text(written.replace(ours, "9.1.2", 1))
    assert load_config(path) == TrainConfig(steps=3), "another version whose fields are known is read"
    for change in (
        ("steps: 3", "stepz: 3"),
        ("precision: f32", "precision: f4"),
        ("name: adamw", "name: lion"),
    ):
        path.write_text(written.replace(*change))
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert "moejax" not in str(caught.value)
        path.write_text(written.replace(ours, "9.1.2", 1).replace(*change))
        with pytest.raises(ConfigError) as another:
            load_config(path)
        end = f"; moejax 9.1.2 wrote {path}, here is moejax {ours}: use that version, or correct the file"
        assert str(another.value) == str(caught.value) + end
    assert version_in(path) == "9.1.2"
    with pytest.raises(ConfigError, match=r"^RUN = x: is odd; moejax 9\.1\.2 wrote "):  # so does a report
        with naming_versions(version_in(path), path):
            raise ConfigError("RUN", "x", "is odd")
    path.write_text("steps: 3\n")
    assert version_in(path) is None
    assert load_config(path) == TrainConfig(steps=3), "by hand, or by a version that did not say so"
