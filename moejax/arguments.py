"""Rules for the arguments of the library, by name: the same name means the same everywhere.

Functions themselves check how arguments must fit each other (divide, be fewer). A name that means something else in one
place gets its rule there: `checked(devices=...)`.

Letters as in the layers: T tokens, B sequences, S positions, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from custom_ops import arguments, checks
from custom_ops.checks import BadArgument as BadArgument
from custom_ops.checks import (
    Rule,
    array,
    flag,
    floating_dtype,
    number,
    whole,
)
from custom_ops.checks import one_of as one_of
from custom_ops.checks import require as require
from moejax.cost import Link

P = ParamSpec("P")
R = TypeVar("R")

SIZE, COUNT = whole(1), whole(0)
WEIGHT = number("a finite number of at least 0", lambda value: 0 <= value < math.inf)
POSITIVE = number("a positive finite number", lambda value: 0 < value < math.inf)
POSITIVE_OR_INFINITE = number("a positive number, or infinite for room for all", lambda value: value > 0)
SHARE = number("between 0 and 1", lambda value: 0 <= value <= 1)


def text(argument: str, value: Any) -> str:
    """A name, which is looked up elsewhere."""
    require(isinstance(value, str), argument, value, "must be a name")
    return value


def streams(argument: str, value: Any) -> nnx.Rngs:
    """Streams of random numbers, one for parameters among them."""
    is_rngs = isinstance(value, nnx.Rngs) and (hasattr(value, "params") or hasattr(value, "default"))
    require(is_rngs, argument, value, "must be nnx.Rngs with a stream for parameters, such as nnx.Rngs(0)")
    return value


def random_key(argument: str, value: Any) -> Any:
    """A single key of `jax.random`, typed or of 32-bit words; also the variable of a stream of `nnx.Rngs`."""
    value = value.get_value() if isinstance(value, nnx.Variable) else value
    is_key = isinstance(value, (jax.Array, np.ndarray)) and (
        value.ndim == 0
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        else value.ndim == 1 and value.dtype == jnp.uint32
    )
    require(is_key, argument, value, "must be one random key, such as jax.random.key(0)")
    return value


def takes(value: Any, count: int, *names: str) -> bool:
    """Whether it can be called with so many arguments and those by name, as far as its signature tells.

    Classes make objects and ufuncs take numbers one by one: neither is meant by any function here.
    """
    if not callable(value) or isinstance(value, (type, np.ufunc, jnp.ufunc)):
        return False
    try:
        inspect.signature(value).bind(*[None] * count, **dict.fromkeys(names))
    except TypeError:
        return False
    except ValueError:  # it has none
        return True
    return True


def function(count: int, call: str) -> Rule:
    """A function or a module that takes so many arguments; `call` shows them."""

    def rule(argument: str, value: Any) -> Any:
        require(takes(value, count), argument, value, f"must be a function or a module {call}")
        return value

    return rule


experts_function = function(3, "experts(x_TD, plan, weights_TK) -> y_TD")


def layer_numbers(argument: str, value: Any) -> tuple[int, ...]:
    """Numbers of layers, from 0."""
    is_collection = (
        hasattr(value, "__iter__") and hasattr(value, "__len__") and not isinstance(value, (str, Mapping))
    )
    require(is_collection, argument, value, "must be numbers of layers, such as (1, 3)")
    return tuple(COUNT(argument, number) for number in value)


def by_name(argument: str, value: Any) -> Mapping[str, Any]:
    """Arguments by name."""
    is_named = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
    require(is_named, argument, value, "must be a mapping of arguments by name, such as dict(num_experts=8)")
    return value


def by_layer(argument: str, value: Any) -> Mapping[int, Mapping[str, Any]]:
    """Arguments by name, of layers by number."""
    rule = "must be a mapping of arguments by number of the layer, such as {1: dict(num_experts=8)}"
    require(isinstance(value, Mapping), argument, value, rule)
    return {COUNT(argument, layer): by_name(f"{argument}[{layer}]", given) for layer, given in value.items()}


def links(argument: str, value: Any) -> Mapping[str, Link]:
    """Links by the mesh axis along which they are; `levels.check_links` knows the axes."""
    is_links = isinstance(value, Mapping) and all(
        isinstance(axis, str) and isinstance(link, Link) for axis, link in value.items()
    )
    require(is_links, argument, value, "must be a moejax.cost.Link for each mesh axis by name")
    return value


def anything(argument: str, value: Any) -> Any:
    """For arguments of many kinds, which the function itself tells apart."""
    return value


RULES: dict[str, Rule] = arguments.RULES | {
    # Sizes and counts. `top_k` is bounded by the router.
    **dict.fromkeys(
        ("d_model", "d_hidden", "shared_hidden", "width", "num_experts", "vocab_size", "num_layers"), SIZE
    ),
    **dict.fromkeys(("num_heads", "num_kv_heads", "chunks", "chunk", "batch_size", "window"), SIZE),
    **dict.fromkeys(("groups", "expert_groups", "limit_groups", "devices", "nodes", "tile"), SIZE),
    **dict.fromkeys(("iterations", "projection", "max_experts"), SIZE),
    **dict.fromkeys(("shadow", "shared_experts", "expert"), COUNT),
    "hash_seed": whole(0, 2**32 - 1),
    "top_k": whole(high=math.inf),
    # Numbers
    **dict.fromkeys(("balance_weight", "z_weight", "importance_weight", "load_weight"), WEIGHT),
    **dict.fromkeys(("orthogonality_weight", "out_scale", "bias_rate"), WEIGHT),
    **dict.fromkeys(("buffer_factor", "eval_capacity_factor", "scale", "rope_theta"), POSITIVE),
    "capacity_factor": POSITIVE,
    "budget_factor": number(
        "at least 1 and finite, so that all choices fit", lambda value: 1 <= value < math.inf
    ),
    "jitter": number("at least 0 and below 1", lambda value: 0 <= value < 1),
    "off_node_share": SHARE,
    # Flags
    **dict.fromkeys(("expert_bias", "keep_demand", "normalize", "router_bias", "random_second"), flag),
    **dict.fromkeys(("tie_embeddings", "observe", "bias", "shared_gate", "gate"), flag),
    # Arrays
    "x_TD": array("[T, D]", jnp.floating),
    "logits_TE": array("[T, E]", jnp.floating),
    "ids_TK": array("[T, K]", jnp.integer),
    "load_E": array("[..., E]"),
    "load_ME": array("[M, E]"),
    "x": array("[..., D]", jnp.floating),
    "x_BSD": array("[B, S, D]", jnp.floating),
    "hidden_BSD": array("[B, S, D]", jnp.floating),
    **dict.fromkeys(("tokens_BS", "segments_BS", "positions_BS", "targets_BS"), array("[B, S]", jnp.integer)),
    "rotation_BS2f": array("[B, S, 2, f]", jnp.floating),
    "token_mask": array("[...]", jnp.bool_),
    "token_ids": array("[...]", jnp.integer),
    "token_mask_T": array("[T]", jnp.bool_),
    "token_ids_T": array("[T]", jnp.integer),
    "key": random_key,
    # The rest
    "rngs": streams,
    "dtype": floating_dtype,
    "fn": function(2, "fn(rows_ND, group_sizes_E) -> rows_ND"),
    "moe": by_name,
    "moe_of_layer": by_layer,
    "links": links,
    "moe_layers": layer_numbers,
    **dict.fromkeys(("router", "experts", "axis"), anything),
    **dict.fromkeys(("drop_by", "rounding"), text),
}


def checked(**own: Rule) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: every argument goes through its rule, one of `own` or of `RULES`; see `custom_ops.checks.checked`."""
    return checks.checked(RULES | own)
