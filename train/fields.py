"""A tree of frozen dataclasses as dotted fields: names, conversion from text, building, overriding.

The command line, YAML files and Python configs all come through here, so a wrong name or type reads the same
wherever it was written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

from train.errors import ConfigError, one_line

T = TypeVar("T")

# Likeness of two names, 0 to 1, from which on one may be a slip for the other.
_ALIKE = 0.4
# So many names can be listed in one line.
_FEW = 12
# Usual short names of fields.
_USUAL = {"lr": "learning_rate", "bs": "batch_size", "wd": "weight_decay"}
_NONE_WORDS = ("None", "null")
_TRUTH = {"true": True, "false": False}


def leaf_types(cls: type) -> dict[str, Any]:
    """Every leaf field below a dataclass: dotted name → its annotated type."""
    leaves: dict[str, Any] = {}
    for name, annotation in _hints(cls).items():
        if dataclasses.is_dataclass(annotation):
            inner = leaf_types(typing.cast(type, annotation))
            leaves.update({f"{name}.{rest}": leaf for rest, leaf in inner.items()})
        else:
            leaves[name] = annotation
    return leaves


def flatten(config: Any) -> dict[str, Any]:
    """Every leaf value of a config: dotted name → value."""
    return {name: get(config, name) for name in leaf_types(type(config))}


def get(config: Any, dotted: str) -> Any:
    """The value at a dotted name."""
    return functools.reduce(getattr, dotted.split("."), config)


def build(cls: type[T], source: object, prefix: str = "") -> T:
    """A checked `cls` from nested mappings or from an instance of `cls`; what is missing keeps its default.

    Raises:
      ConfigError: an unknown field (names the nearest), or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    hints = _hints(cls)
    for name, value in _items(cls, source, prefix):
        if name not in hints:
            raise unknown_field(prefix + name, value, [prefix + leaf for leaf in leaf_types(cls)])
        annotation = hints[name]
        if dataclasses.is_dataclass(annotation):
            values[name] = build(typing.cast(type, annotation), value, f"{prefix}{name}.")
        else:
            values[name] = convert(prefix + name, value, annotation)
    return cls(**values)


def override(config: T, texts: Mapping[str, str], prefix: str = "") -> T:
    """The config with some dotted fields replaced by values given as text.

    Args:
      config: any dataclass of this kind.
      texts: dotted name → text, as on the command line; `None` or `null` unsets an optional field.
      prefix: put before a field's name in errors, such as `--` for options that are no config fields.

    Raises:
      ConfigError: an unknown field (names the nearest), or text that is not of the field's type.
    """
    leaves = leaf_types(type(config))
    for name, text in texts.items():
        if name not in leaves:
            raise unknown_field(prefix + name, text, [prefix + leaf for leaf in leaves])
        unset = text in _NONE_WORDS and _is_optional(leaves[name])
        value = None if unset else convert(prefix + name, text, leaves[name])
        config = _replace(config, name.split("."), value)
    return config


def convert(field: str, value: object, annotation: Any) -> Any:
    """A value of the annotated type from a value of that type or from its text.

    Raises:
      ConfigError: the value is not of that type; the message names `field`.
      TypeError: the annotation is none of int, float, bool, str, Literal, a union of these, or one of these `| None`.
    """
    if _is_optional(annotation):
        if value is None:
            return None
        (annotation,) = (a for a in typing.get_args(annotation) if a is not types.NoneType)
        suffix = ", or None (null in YAML)"
    else:
        suffix = ""
    converter, rule = _converter(annotation)
    try:
        return converter(value)
    except (ValueError, OverflowError):
        raise ConfigError(field, shown(value), rule + suffix) from None


def unknown_field(field: str, value: object, known: Iterable[str]) -> ConfigError:
    """The error for a field that does not exist, with the nearest one that does."""
    known = list(known)
    if group := [name.removeprefix(f"{field}.") for name in known if name.startswith(f"{field}.")]:
        more = f" and {len(group) - _FEW} more" if len(group) > _FEW else ""
        return ConfigError(field, shown(value), f"is a group of fields: {', '.join(group[:_FEW])}{more}")
    return ConfigError(field, shown(value), f"no such field{nearest(field, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """`; the nearest is …`: the known name most like this one; where none is like it, all of a few, else nothing.

    A known name that ends in the same part (`top_k`, `model.moe.top_k`), or in what it is usually short for (`lr`), is
    nearer than one spelt alike.
    """
    known = list(known)
    last = name.rsplit(".", 1)[-1].lstrip("-")
    last = _USUAL.get(last, last)
    same_ending = [other for other in known if other.rsplit(".", 1)[-1].lstrip("-") == last]
    match = difflib.get_close_matches(name, same_ending or known, n=1, cutoff=0.0 if same_ending else _ALIKE)
    if match:
        return f"; the nearest is {match[0]}"
    return f"; there are {', '.join(known)}" if 0 < len(known) <= _FEW else ""


def shown(value: object, limit: int = 120) -> str:
    """A value as it is shown in an error: one line, empty text visible, the end of a long one cut off."""
    return one_line(value, limit)


def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _items(cls: type, source: object, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(source, cls):
        for name in _hints(cls):
            yield name, getattr(source, name)
    elif isinstance(source, Mapping):
        for name, value in source.items():
            yield str(name), value
    else:
        rule = f"must be a group of fields: {', '.join(leaf_types(cls))}"
        raise ConfigError(prefix.removesuffix(".") or "config", shown(source), rule)


def _replace(config: T, path: list[str], value: object) -> T:
    head, *rest = path
    inner = _replace(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: inner})  # type: ignore[type-var]


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Union, types.UnionType)


def _is_optional(annotation: Any) -> bool:
    return _is_union(annotation) and types.NoneType in typing.get_args(annotation)


def _converter(annotation: Any) -> tuple[typing.Callable[[object], object], str]:
    """What makes a value of this type (ValueError if it cannot), and the rule to tell the user."""
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        one_of = "one of " if len(choices) > 1 else ""
        return lambda value: choices[choices.index(value)], f"must be {one_of}{', '.join(map(str, choices))}"
    if _is_union(annotation):
        converters, rules = zip(*map(_converter, typing.get_args(annotation)), strict=True)
        others = [rule.removeprefix("must be ") for rule in rules[1:]]
        return functools.partial(_first_that_can, converters), ", or ".join([rules[0], *others])
    simple: dict[Any, tuple[typing.Callable[[object], object], str]] = {
        bool: (_to_bool, "must be true or false"),
        int: (_to_int, "must be an integer"),
        float: (_to_float, "must be a number"),
        str: (_to_str, "must be text"),
    }
    if annotation not in simple:
        raise TypeError(f"config fields cannot have the type {annotation}")
    return simple[annotation]


def _first_that_can(converters: Iterable[typing.Callable[[object], object]], value: object) -> object:
    for converter in converters:
        with contextlib.suppress(ValueError):
            return converter(value)
    raise ValueError


def _to_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUTH:
        return _TRUTH[value.lower()]
    raise ValueError


def _to_int(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError
    return int(value)


def _to_float(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)


def _to_str(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value
