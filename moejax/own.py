"""Checks of a caller's own router, experts and options, made when the layer is built.

`moejax.routing.check` checks a router's decisions when it is called.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from custom_ops.checks import BadArgument, array, one_of, require, shown
from moejax.arguments import takes
from moejax.mesh import LOGICAL_AXES
from moejax.routing import ROUTERS, LinearRouter, router_options


def one_array(argument: str, value: Any) -> Any:
    """The tokens [..., D] of a layer; nested ones are told how to become one array."""
    if isinstance(value, (Mapping, tuple)):
        rule = (
            "must be one array [..., D]; nested inputs are to be joined along their width before the layer and split "
            "again in the router and the experts"
        )
        raise BadArgument(argument, value, rule)
    return array("[..., D]", jnp.floating)(argument, value)


def check_router(router: Any, d_model: int, num_experts: int) -> None:
    """Refuse a router that is no module, or one of other sizes than the layer.

    Raises:
      ValueError: names `router`.
    """
    call = "router(x_TD, token_mask_T=, token_ids_T=, key=) -> Routing"
    rule = f"must be one of {', '.join(ROUTERS)}, or a module {call}"
    is_router = isinstance(router, nnx.Module) and takes(router, 1, "token_mask_T", "token_ids_T", "key")
    require(is_router, "router", router, rule)
    check_axes("router", router)
    own = getattr(router, "num_experts", num_experts)
    rule = f"has num_experts = {own}, the layer has {num_experts}"
    require(own == num_experts, "router", type(router), rule)
    if isinstance(router, LinearRouter):
        width = router.w_DE.shape[0]
        require(width == d_model, "router", type(router), f"has d_model = {width}, the layer has {d_model}")


def check_own_experts(experts: Any, num_experts: int) -> None:
    """Refuse a module that does not take what experts do, or parameters stacked over another number of experts.

    Raises:
      ValueError: names `experts`.
    """
    rule = "must be a module experts(x_TD, plan, weights_TK) -> y_TD"
    require(takes(experts, 3), "experts", type(experts), rule)
    check_axes("experts", experts)
    for path, variable in _variables("experts", experts):
        names = tuple(variable.get_metadata("axes", ()))
        if "experts" in names:
            value = variable.get_value()
            count = value.shape[names.index("experts") - len(names)]
            rule = f"is of {count} experts, num_experts is {num_experts}"
            require(count == num_experts, path, value, rule)


def check_axes(argument: str, module: Any) -> None:
    """Refuse a parameter whose `axes` are not the logical axes of its dimensions.

    Raises:
      ValueError: names the parameter, beginning with `argument`.
    """
    for path, variable in _variables(argument, module):
        axes, value = variable.get_metadata("axes", ()), variable.get_value()
        rule = "must be a tuple of each dimension's logical axis, None for one that is never split"
        require(isinstance(axes, (tuple, list)), f"{path}.axes", axes, rule)
        for name in axes:
            if name is not None:
                one_of(LOGICAL_AXES)(f"{path}.axes", name)
        rule = f"must be at most one for each dimension of {shown(value)}"
        require(len(axes) <= np.ndim(value), f"{path}.axes", axes, rule)


def _variables(argument: str, module: Any) -> Iterator[tuple[str, nnx.Variable]]:
    """The variables of a module with their paths, such as `experts[0].w`."""
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if isinstance(variable, nnx.Variable):
            parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
            yield argument + "".join(parts), variable


def refuse_unknown(router: str, options: Mapping[str, Any], layer: type) -> None:
    """Refuse what is neither an argument of the layer nor an option of its router, with the nearest of both.

    Raises:
      ValueError: names the argument.
    """
    known = router_options(router) if router in ROUTERS else ()
    own = [
        name
        for name in inspect.signature(vars(layer)["__init__"]).parameters
        if name not in ("self", "router_options")
    ]
    for option, value in options.items():
        if router in ROUTERS and option not in known:
            rule = f"router {router} has no such option; "
            rule += f"its options are {', '.join(known)}" if known else "it has none"
            others = [name for name in ROUTERS if option in router_options(name)]
            if others:
                rule += f"; it is an option of {', '.join(others)}"
            if near := difflib.get_close_matches(option, [*known, *own], n=1, cutoff=0.5):
                rule += f"; the nearest argument of the layer is {near[0]}"
            raise BadArgument(option, value, rule)
