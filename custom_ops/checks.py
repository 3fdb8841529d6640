"""Checks of arguments: every refusal is one line, `argument = value: must be ...`.

A rule takes an argument's name and value and returns the value as it is used, or raises `BadArgument`. `checked` puts a
rule before every argument of a function, so that none goes unchecked.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, ParamSpec, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

# Positions are int32, here and in every kernel.
MAX_ELEMENTS = 2**31

Rule = Callable[[str, Any], Any]
P = ParamSpec("P")
R = TypeVar("R")

_LONGEST = 80  # characters of a value in a message
_MOST_BITS = 4096  # of an integer that is written out; Python refuses to write much larger ones
_OF_KIND = {
    None: "",
    jnp.floating: " of floating-point numbers",
    jnp.integer: " of integers",
    jnp.bool_: " of booleans",
}


class BadArgument(ValueError):
    """An argument that is refused.

    Args:
      argument: its name.
      value: what was given.
      rule: what is allowed.
    """

    def __init__(self, argument: str, value: object, rule: str):
        self.argument, self.value, self.rule = argument, value, rule
        super().__init__(f"{argument} = {shown(value)}: {rule}")


def shown(value: object) -> str:
    """A value as one short line; of an array its dtype and shape."""
    if is_array(value):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"an integer of {value.bit_length()} bits"
    text = " ".join((value.__name__ if isinstance(value, type) else repr(value)).split())
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def is_array(value: object) -> TypeGuard[jax.Array | np.ndarray]:
    """Whether it is an array, or what jax takes as one: the type tells, for some objects have any attribute."""
    return isinstance(value, (jax.Array, np.ndarray)) or hasattr(type(value), "__jax_array__")


def require(condition: bool, argument: str, value: object, rule: str) -> None:
    """Raise BadArgument unless the condition holds."""
    if not condition:
        raise BadArgument(argument, value, rule)


def require_shape(argument: str, value: Any, shape: Sequence[int], what: str) -> None:
    """Raise BadArgument unless the array has this shape; `what` says where it comes from."""
    require(tuple(value.shape) == tuple(shape), argument, value, f"must be {list(shape)}, {what}")


def whole(low: float = -math.inf, high: float = MAX_ELEMENTS - 1) -> Rule:
    """An integer between two bounds, both allowed; without `high` at most what an int32 holds."""
    bounds = [f"of at least {low}"] * math.isfinite(low) + [f"at most {high}"] * math.isfinite(high)
    text = " ".join(["must be an integer", " and ".join(bounds)]).strip()

    def rule(argument: str, value: Any) -> int:
        is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        require(is_whole and low <= value <= high, argument, value, text)
        return int(value)

    return rule


def number(text: str, is_allowed: Callable[[float], bool]) -> Rule:
    """A real number, `text` saying which are allowed; never NaN."""

    def rule(argument: str, value: Any) -> float:
        is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        try:
            is_number = is_number and not math.isnan(value)
        except OverflowError:  # an integer beyond all floats
            is_number = False
        require(is_number and is_allowed(value), argument, value, f"must be {text}")
        return float(value)  # an integer may be beyond those of jax

    return rule


def flag(argument: str, value: Any) -> bool:
    """True or False."""
    require(isinstance(value, (bool, np.bool_)), argument, value, "must be True or False")
    return bool(value)


def one_of(names: Collection[str]) -> Rule:
    """One of some names; the message has them all, and the nearest."""

    def rule(argument: str, value: Any) -> str:
        if not isinstance(value, str) or value not in names:
            unknown_name(argument, value, names)
        return value

    return rule


def unknown_name(argument: str, value: object, names: Collection[str]) -> NoReturn:
    """Raise BadArgument with all names and, for a text, the nearest."""
    near = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    hint = f"; the nearest is {near[0]}" if near else ""
    raise BadArgument(argument, value, f"must be one of {', '.join(names)}{hint}")


def floating_dtype(argument: str, value: Any) -> jnp.dtype:
    """A floating-point dtype or its name."""
    try:
        dtype = jnp.dtype(value)
        is_floating = value is not None and jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        is_floating = False
    require(is_floating, argument, value, "must be a floating-point dtype")
    return dtype


def instance_of(kind: type, description: str) -> Rule:
    """An instance of a class."""

    def rule(argument: str, value: Any) -> Any:
        require(isinstance(value, kind), argument, value, f"must be {description}")
        return value

    return rule


def array(shape: str, kind: Any = None, *, of_one_device: bool = False) -> Rule:
    """An array; no list, whose dtype nobody has chosen.

    Args:
      shape: one letter per dimension, such as "[T, D]", or "[..., D]" for any number of leading ones.
      kind: `jnp.floating`, `jnp.integer` or `jnp.bool_`; None: any.
      of_one_device: what an op gets, whose offsets are i32: it must have fewer than 2**31 elements. Arrays that are
        split over devices may have more.
    """
    dims = shape.strip("[]").split(", ")
    rank = len(dims) - (dims[0] == "...")
    text = f"must be an array {shape}{_OF_KIND[kind]}"

    def rule(argument: str, value: Any) -> Any:
        require(is_array(value), argument, value, text)
        has_rank = value.ndim >= rank if dims[0] == "..." else value.ndim == rank
        require(has_rank and (kind is None or jnp.issubdtype(value.dtype, kind)), argument, value, text)
        fits = not of_one_device or value.size < MAX_ELEMENTS
        require(fits, argument, value, f"must have fewer than 2**31 elements {shape}")
        return value

    return rule


def checked(rules: Mapping[str, Rule]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: the function gets its arguments as the rules return them.

    None passes where it is the default or the annotation allows it. `self`, `*args` and `**kwargs` have no rule; a
    function that has any other argument without one cannot be decorated.
    """

    def decorate(fn: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(fn)
        kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        named = {n: p for n, p in signature.parameters.items() if n != "self" and p.kind not in kinds}
        if missing := [name for name in named if name not in rules]:
            raise TypeError(f"{fn.__qualname__} has arguments without a rule: {', '.join(missing)}")
        may_be_none = {n for n, p in named.items() if p.default is None or "None" in str(p.annotation)}

        @functools.wraps(fn)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return fn(*args, **kwargs)  # whose own message has the function's name
            for name, value in bound.arguments.items():
                if name in named and not (value is None and name in may_be_none):
                    bound.arguments[name] = rules[name](name, value)
            return fn(*bound.args, **bound.kwargs)

        return run

    return decorate
