import dataclasses
from typing import Literal

import pytest

from train.config import TrainConfig
from train.errors import ConfigError
from train.fields import build, convert, flatten, get, leaf_types, nearest, override, shown


def test_every_field_of_the_config_can_be_converted_from_its_text():
    config = TrainConfig()
    for name, annotation in leaf_types(TrainConfig).items():
        value = get(config, name)
        if value is not None:
            assert convert(name, str(value), annotation) == value, name


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (int, "-7", -7),
        (float, "1e-3", 1e-3),
        (float, "2", 2.0),
        (float, 2, 2.0),
        (bool, "False", False),
        (bool, "true", True),
        (str, "5", "5"),
        (int | None, "5", 5),
        (int | None, None, None),
        (Literal["a", "b"], "b", "b"),
        (int | Literal["auto"], "5", 5),
        (int | Literal["auto"], "auto", "auto"),
    ],
)
def test_convert(annotation, text, value):
    result = convert("field", text, annotation)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("annotation", "value", "rule"),
    [
        (int, "abc", "must be an integer"),
        (int, "1.5", "must be an integer"),
        (int, 1.0, "must be an integer"),
        (int, True, "must be an integer"),
        (int, None, "must be an integer"),
        (int, "9" * 5000, "must be an integer"),
        (float, "fast", "must be a number"),
        (float, False, "must be a number"),
        (float, 10**400, "must be a number"),
        (bool, "1", "must be true or false"),
        (bool, 1, "must be true or false"),
        (str, 5, "must be text"),
        (int | None, "abc", "must be an integer, or None (null in YAML)"),
        (Literal["a", "b"], "c", "must be one of a, b"),
        (Literal["a", "b"], ["a"], "must be one of a, b"),
        (int | Literal["auto"], "aut", "must be an integer, or auto"),
        (int | Literal["auto"], True, "must be an integer, or auto"),
    ],
)
def test_wrong_type_names_field_value_and_rule(annotation, value, rule):
    with pytest.raises(ConfigError) as caught:
        convert("some.field", value, annotation)
    assert str(caught.value) == f"some.field = {shown(value)}: {rule}"


def test_a_field_type_that_nobody_can_type_is_a_bug():
    with pytest.raises(TypeError, match="cannot have the type"):
        convert("field", "1", list[int])


def test_override_changes_only_what_it_names():
    before = TrainConfig()
    after = override(before, {"steps": "5", "model.moe.top_k": "2", "optimizer.learning_rate": "1"})
    changed = {name for name, value in flatten(after).items() if value != flatten(before)[name]}
    assert changed == {"steps", "model.moe.top_k", "optimizer.learning_rate"}
    assert after.model.moe.top_k == 2 and type(after.optimizer.learning_rate) is float
    assert override(after, {"model.moe.top_k": "None"}).model.moe.top_k is None
    assert override(after, {"data.path": "null"}).data.path is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.moe.topk", "model.moe.top_k"),
        ("top_k", "model.moe.top_k"),
        ("step", "steps"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("eval.evry", "eval.every"),
    ],
)
def test_unknown_field_names_the_nearest(name, expected):
    with pytest.raises(ConfigError, match="no such field; the nearest is") as caught:
        override(TrainConfig(), {name: "1"})
    assert caught.value.field == name
    named = str(caught.value).rsplit(" ", 1)[1]
    assert named == expected


def test_nothing_is_called_nearest_that_is_not_like_it():
    with pytest.raises(ConfigError, match=r"no such field$"):
        override(TrainConfig(), {"zzz.qqq": "1"})
    assert nearest("xx", ["seed", "prompt"]) == "; there are seed, prompt"


def test_group_as_field_lists_its_fields():
    with pytest.raises(
        ConfigError, match=r"mesh = 3: is a group of fields: data, expert_node, expert, tensor, fsdp"
    ):
        override(TrainConfig(), {"mesh": "3"})


def test_build_checks_instances_as_it_checks_mappings():
    wrong = dataclasses.replace(TrainConfig(), steps="many")
    with pytest.raises(ConfigError, match="steps = many: must be an integer"):
        build(TrainConfig, wrong)
    with pytest.raises(ConfigError, match=r"model\.moe = 8: must be a group of fields"):
        build(TrainConfig, {"model": {"moe": 8}})
    with pytest.raises(
        ConfigError, match=r"model\.moe\.experts = 8: no such field; .* model\.moe\.num_experts"
    ):
        build(TrainConfig, {"model": {"moe": {"experts": 8}}})
    assert build(TrainConfig, TrainConfig()) == build(TrainConfig, {}) == TrainConfig()


def test_shown_is_one_short_visible_line():
    assert shown("") == "''"
    assert shown("two\nlines") == "two lines"
    assert len(shown("x" * 1000)) < 130
    assert nearest("x", []) == ""
