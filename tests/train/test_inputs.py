"""A run's files are known by their content: they may move, and no other content may take their place."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import tokenizers

from tests.train import small
from train.config import DataConfig, ModelConfig, TrainConfig
from train.config_io import load_config, save_config
from train.data import load_corpus, load_tokenizer
from train.data.huggingface import HuggingFaceTokenizer
from train.errors import ConfigError
from train.inputs import marks, read_began, read_inputs
from train.integrity import hash_lines, write_manifest


@pytest.fixture
def project(tmp_path):
    """Data, tokenizer and a run that has a checkpoint, in one folder."""
    folder = tmp_path / "old"
    folder.mkdir()
    text = small.write_text(folder / "text.txt").read_text()
    (folder / "held-out.txt").write_text(text[:900])
    (folder / "mine.json").write_text(
        json.dumps({"moejax_tokenizer": "char", "characters": "".join(set(text))})
    )
    begin(folder, path="text.txt", validation_path="held-out.txt", tokenizer="mine.json")
    return folder


def typed(**fields):
    return TrainConfig(data=DataConfig(sequence_length=16, **fields))


def begin(folder, **fields):
    """What a run leaves after its first checkpoint."""
    run = folder / "run"
    places = {name: str(folder / value) for name, value in fields.items()}
    inputs = read_inputs(typed(**places), run, None, None)
    record = {
        "data_state": {"tokenizer_hash": inputs.corpus.tokenizer_hash},
        "extra": marks(inputs.corpus, inputs.tokenizer),
    }
    write_record(run, 2, json.dumps(record))
    save_config(inputs.config, run / "config.yaml")
    inputs.tokenizer.save(run)


def write_record(run, step, content):
    checkpoint = run / "checkpoints" / str(step)
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / "record.json").write_text(content)
    write_manifest(checkpoint, hash_lines(checkpoint))


def go_on(folder, **fields):
    run = folder / "run"
    return read_inputs(typed(**fields), run, load_config(run / "config.yaml"), read_began(run))


RELATIVE = {"path": "text.txt", "validation_path": "held-out.txt", "tokenizer": "mine.json"}


def test_a_moved_project_goes_on_with_the_same_command(project, monkeypatch):
    new = project.rename(project.with_name("new"))
    expected = {name: str(new / value) for name, value in RELATIVE.items()}
    monkeypatch.chdir(new)
    for fields in (RELATIVE, {name: f"./{value}" for name, value in RELATIVE.items()}, expected):
        inputs = go_on(new, **fields)
        assert dataclasses.asdict(inputs.config.data) == dataclasses.asdict(typed(**expected).data)
        assert inputs.moved[0] == (
            f"data.path: {project}/text.txt is now {new}/text.txt, with the same content"
        )
        assert len(inputs.moved) == 3
    monkeypatch.chdir(new.parent)
    earlier = load_config(new / "run" / "config.yaml")
    for fields in (RELATIVE, dataclasses.asdict(earlier.data)):
        inputs = go_on(new, **{name: fields[name] for name in RELATIVE})
        assert inputs.config.data.path == expected["path"], "found from the run's own folder"
    inputs = read_inputs(earlier, new / "run", earlier, read_began(new / "run"), load_tokenizer(new / "run"))
    assert inputs.config.data.validation_path == expected["validation_path"], "as `moejax eval` does"


def test_a_project_may_move_twice_between_two_checkpoints(project, monkeypatch):
    monkeypatch.chdir(project.parent)
    for name in ("new", "newer", "newest"):
        project = project.rename(project.with_name(name))
        inputs = go_on(project, **RELATIVE)
        assert inputs.config.data.path == str(project / "text.txt")
        save_config(inputs.config, project / "run" / "config.yaml")


def test_the_folder_of_a_run_whose_config_does_not_say_it_comes_from_its_record(project):
    config = project / "run" / "config.yaml"
    config.write_text(config.read_text().partition("run_directory:")[0])
    assert read_began(project / "run").run_directory is None
    record = json.loads((project / "run" / "checkpoints" / "2" / "record.json").read_text())
    record["extra"]["run_directory"] = "/before/run"
    write_record(project / "run", 2, json.dumps(record))
    assert read_began(project / "run").run_directory == "/before/run"


def test_data_that_moved_alone_goes_on_where_it_is_named(project, tmp_path):
    shutil.move(project / "text.txt", tmp_path / "data.txt")
    rest = {name: str(project / RELATIVE[name]) for name in ("validation_path", "tokenizer")}
    inputs = go_on(project, path=str(tmp_path / "data.txt"), **rest)
    assert inputs.config.data.path == str(tmp_path / "data.txt") and len(inputs.moved) == 1
    with pytest.raises(ConfigError, match=r"^data\.path = .*/old/text\.txt: no such file"):
        go_on(project, path=str(project / "text.txt"), **rest)
    with pytest.raises(ConfigError, match=r"^data\.path = .*/none\.txt: no such file"):
        go_on(project, path=str(tmp_path / "none.txt"), **rest)


def test_other_content_is_refused_by_field_old_and_new(project, tmp_path):
    old = {name: str(project / value) for name, value in RELATIVE.items()}
    for name, value in RELATIVE.items():
        other = tmp_path / value
        content = (project / value).read_text()
        other.write_text(
            content.replace("quick", "brown")
            if value.endswith(".txt")
            else content.replace('ers": "', 'ers": "%')
        )
        rule = (
            rf"its content is not that of {old[name]}, with which the run began \(sha256 \w+ then, \w+ now\)"
        )
        with pytest.raises(ConfigError, match=rf"^data\.{name} = {other}: {rule}"):
            go_on(project, **{**old, name: str(other)})
    (project / "text.txt").write_text("a quick dog " * 99)
    with pytest.raises(
        ConfigError, match=rf"^data\.path = {project}/text\.txt: its content has changed since"
    ):
        go_on(project, **old)


def test_of_two_files_the_one_with_the_content_is_taken(project, tmp_path, monkeypatch):
    shutil.copytree(project, tmp_path / "new")
    (project / "text.txt").write_text("other text " * 99)
    (project / "held-out.txt").unlink()
    monkeypatch.chdir(tmp_path / "new")
    inputs = go_on(tmp_path / "new", **RELATIVE)
    assert inputs.config.data.path == str(tmp_path / "new" / "text.txt")
    assert inputs.config.data.validation_path == str(tmp_path / "new" / "held-out.txt")


def test_the_places_are_chosen_without_tokens(project, tmp_path, monkeypatch):
    shutil.copytree(project, tmp_path / "new")
    (project / "text.txt").write_text("\u2603 that this tokenizer does not know")
    monkeypatch.chdir(tmp_path / "new")
    loaded = []
    monkeypatch.setattr("train.inputs.load_corpus", lambda *args: loaded.append(args) or load_corpus(*args))
    go_on(tmp_path / "new", **RELATIVE)
    assert len(loaded) == 1 and loaded[0][0].path == str(tmp_path / "new" / "text.txt")
    small_model = dataclasses.replace(typed(**RELATIVE), model=ModelConfig(vocab_size=8))
    with pytest.raises(ConfigError, match=r"^model\.vocab_size = 8: must be at least the tokenizer's"):
        read_inputs(small_model, tmp_path / "none", None, None)
    assert len(loaded) == 1, "it is found before the text is read"


def test_a_run_that_began_with_other_rules_of_encoding_goes_on_with_a_warning(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("to be or not to be " * 40)
    model = tokenizers.models.WordLevel({"to": 0, "be": 1, "<unk>": 2}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    begin(tmp_path, path="text.txt", tokenizer="words.json")
    fields = {"path": str(tmp_path / "text.txt"), "tokenizer": str(tmp_path / "words.json")}
    assert go_on(tmp_path, **fields).warnings == ()
    record = json.loads((tmp_path / "run" / "checkpoints" / "2" / "record.json").read_text())
    del record["extra"]["encoding_rules"]  # as older versions wrote it
    write_record(tmp_path / "run", 2, json.dumps(record))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(re.sub("^moejax: .*", "moejax: 0.0.1", config.read_text()))
    (line,) = go_on(tmp_path, **fields).warnings
    before = "data.tokenizer: the run began with moejax 0.0.1, which"
    spelt = "text that spells a special token, such as <|im_start|>"
    assert line == f"{before} gave other ids to {spelt}"
    monkeypatch.setattr(
        HuggingFaceTokenizer,
        "encoding_changes",
        HuggingFaceTokenizer.encoding_changes | {3: "text in tables"},
    )
    assert go_on(tmp_path, **fields).warnings == (
        f"{before} gave other ids to {spelt}, and to text in tables",
    )
    for rules, rest in (
        (2, "gave other ids to text in tables"),
        (4, "has newer rules of encoding (4): some text may get other ids here"),
    ):
        record["extra"]["encoding_rules"] = rules
        write_record(tmp_path / "run", 2, json.dumps(record))
        assert go_on(tmp_path, **fields).warnings == (f"{before} {rest}",)


def test_a_tokenizer_that_has_gone_is_the_runs_own_copy(project, monkeypatch):
    (project / "mine.json").unlink()
    monkeypatch.chdir(project)
    inputs = go_on(project, **RELATIVE)
    assert inputs.config.data.tokenizer == str(project / "run" / "tokenizer.json")
    with pytest.raises(ConfigError, match=r"^data\.tokenizer = mime\.json: no such file"):
        go_on(project, **{**RELATIVE, "tokenizer": "mime.json"})
    with pytest.raises(ConfigError, match=r"^data\.tokenizer = bytes: its content is not that of"):
        go_on(project, **{**RELATIVE, "tokenizer": "bytes"})


def test_the_same_bytes_read_in_another_way_are_other_data(tmp_path):
    ids = np.tile(np.arange(97, 117), 40).astype("<u2")
    ids.tofile(tmp_path / "ids.bin")
    begin(tmp_path, path="ids.bin")
    shutil.copy(tmp_path / "ids.bin", tmp_path / "ids.txt")
    with pytest.raises(
        ConfigError, match=r"^data\.path = .*ids\.txt: gives 1440 training tokens, .* with 720"
    ):
        go_on(tmp_path, path=str(tmp_path / "ids.txt"))
    begin(tmp_path, path="ids.txt", validation_path="ids.bin")
    rule = r"gives 1600 validation tokens, but the run began with 800; name the same file"
    with pytest.raises(ConfigError, match=rf"^data\.validation_path = .*ids\.txt: {rule}"):
        go_on(tmp_path, path=str(tmp_path / "ids.txt"), validation_path=str(tmp_path / "ids.txt"))


def test_without_a_checkpoint_there_is_nothing_to_be_the_same_as(project):
    shutil.rmtree(project / "run" / "checkpoints")
    held_out = str(project / "held-out.txt")
    assert go_on(project, path=held_out).config.data.path == held_out
    for content in ("", "[]", '{"extra": 3}'):
        write_record(project / "run", 2, content)
        assert read_began(project / "run") is None


def test_a_record_that_is_not_what_was_written_is_passed_over(project):
    checkpoints = project / "run" / "checkpoints"
    began = read_began(project / "run")
    shutil.copytree(checkpoints / "2", checkpoints / "4")
    record = checkpoints / "4" / "record.json"
    record.write_text(record.read_text().replace(began.content_hash, began.content_hash[::-1]))
    assert read_began(project / "run") == began
    go_on(project, **{name: str(project / value) for name, value in RELATIVE.items()})


def test_a_file_with_the_name_of_a_tokenizer_is_no_path(tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("some text " * 99)
    monkeypatch.chdir(tmp_path)
    for name in ("bytes", "char"):
        (tmp_path / name).mkdir()
        inputs = read_inputs(typed(path="text.txt", tokenizer=name), tmp_path / "run", None, None)
        assert inputs.config.data.tokenizer == name
        assert re.fullmatch(r"/.*/text\.txt", inputs.config.data.path)
