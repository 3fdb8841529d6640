"""Checks of a caller's own router, experts and options, made when the layer is built.

`moejax.routing.check` checks a router's decisions when it is called.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from custom_ops.checks import BadArgument, array, one_of, require
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
    rule = f"must be one of {', '.join(ROUTERS)}, or a module router(x_TD, ...) -> Routing"
    require(isinstance(router, nnx.Module) and callable(router), "router", router, rule)
    own = getattr(router, "num_experts", num_experts)
    rule = f"has num_experts = {own}, the layer has {num_experts}"
    require(own == num_experts, "router", type(router), rule)
    if isinstance(router, LinearRouter):
        width = router.w_DE.shape[0]
        require(width == d_model, "router", type(router), f"has d_model = {width}, the layer has {d_model}")


def check_own_experts(experts: Any, num_experts: int) -> None:
    """Refuse experts that cannot be called, or parameters stacked over another number of experts.

    Raises:
      ValueError: names `experts`.
    """
    require(
        callable(experts),
        "experts",
        type(experts),
        "must be a module experts(x_TD, plan, weights_TK) -> y_TD",
    )
    for path, variable in nnx.to_flat_state(nnx.state(experts)):
        names = tuple(variable.get_metadata("axes", ()))
        for name in names:
            one_of(LOGICAL_AXES)(f"axes of experts.{'.'.join(map(str, path))}", name)
        if "experts" in names:
            count = variable.shape[names.index("experts") - len(names)]
            rule = f"{'.'.join(map(str, path))} is of {count} experts, num_experts is {num_experts}"
            require(count == num_experts, "experts", type(experts), rule)


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
                rule += (
                    f"; {', '.join(others)} has it" if len(others) == 1 else f"; {', '.join(others)} have it"
                )
            elif near := difflib.get_close_matches(option, [*known, *own], n=1):
                rule += f"; the nearest argument of the layer is {near[0]}"
            raise BadArgument(option, value, rule)
