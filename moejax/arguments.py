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

import jax.numpy as jnp
from flax import nnx

from custom_ops import arguments, checks
from custom_ops.checks import BadArgument as BadArgument
from custom_ops.checks import (
    Rule,
    array,
    flag,
    floating_dtype,
    function,
    number,
    random_key,
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


def experts_function(argument: str, value: Any) -> Any:
    """Experts as a function or a module of three arguments."""
    try:
        inspect.signature(value).bind(None, None, None)
    except TypeError:
        rule = "must be a function or a module experts(x_TD, plan, weights_TK) -> y_TD"
        raise BadArgument(argument, value, rule) from None
    return value


def layer_numbers(argument: str, value: Any) -> tuple[int, ...]:
    """Numbers of layers, from 0."""
    is_collection = (
        hasattr(value, "__iter__") and hasattr(value, "__len__") and not isinstance(value, (str, Mapping))
    )
    require(is_collection, argument, value, "must be numbers of layers, such as (1, 3)")
    return tuple(COUNT(argument, number) for number in value)


def mapping(argument: str, value: Any) -> Mapping[Any, Any]:
    """Arguments by name, or something by number."""
    require(isinstance(value, Mapping), argument, value, "must be a mapping, such as a dict")
    return value


def links(argument: str, value: Any) -> Mapping[str, Link]:
    """Links by the mesh axis along which they are."""
    is_links = isinstance(value, Mapping) and all(isinstance(link, Link) for link in value.values())
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
    "top_k": whole(),
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
    "fn": function,
    **dict.fromkeys(("moe", "moe_of_layer"), mapping),
    "links": links,
    "moe_layers": layer_numbers,
    **dict.fromkeys(("router", "experts", "axis"), anything),
    **dict.fromkeys(("drop_by", "rounding"), text),
}


def checked(**own: Rule) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: every argument goes through its rule, one of `own` or of `RULES`; see `custom_ops.checks.checked`."""
    return checks.checked(RULES | own)
