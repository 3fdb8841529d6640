"""Routers: which experts each token goes to, and with which weights. One class each, in a file of its own."""

from __future__ import annotations

import inspect
from typing import Any

from flax import nnx

from custom_ops.checks import one_of
from moejax.arguments import checked
from moejax.routing.cosine import Cosine as Cosine
from moejax.routing.decision import ROUTING_DECISION as ROUTING_DECISION
from moejax.routing.decision import Routing as Routing
from moejax.routing.decision import softmax_top_k as softmax_top_k
from moejax.routing.expert_choice import ExpertChoice as ExpertChoice
from moejax.routing.fixed import Hash as Hash
from moejax.routing.fixed import One as One
from moejax.routing.fixed import Random as Random
from moejax.routing.gshard import GShard as GShard
from moejax.routing.noisy import NoisyTopK as NoisyTopK
from moejax.routing.rounded import RoundedTopK as RoundedTopK
from moejax.routing.router import BadOption as BadOption
from moejax.routing.router import LinearRouter as LinearRouter
from moejax.routing.router import Router as Router
from moejax.routing.router import RouterState as RouterState
from moejax.routing.sigmoid import Sigmoid as Sigmoid
from moejax.routing.sinkhorn import Sinkhorn as Sinkhorn
from moejax.routing.swipe import Swipe as Swipe
from moejax.routing.switch import Switch as Switch
from moejax.routing.topk import TopK as TopK
from moejax.routing.topology import Topology as Topology

ROUTERS: dict[str, Any] = {
    "topk": TopK,
    "noisy": NoisyTopK,
    "gshard": GShard,
    "switch": Switch,
    "sigmoid": Sigmoid,
    "expert_choice": ExpertChoice,
    "sinkhorn": Sinkhorn,
    "hash": Hash,
    "random": Random,
    "one": One,
    "cosine": Cosine,
    "swipe": Swipe,
    "topology": Topology,
    "rounded": RoundedTopK,
}


def router_options(name: str) -> tuple[str, ...]:
    """Names of the options that the named router has, beyond `top_k`."""
    parameters = inspect.signature(ROUTERS[name].__init__).parameters
    return tuple(p for p in parameters if p not in ("self", "d_model", "num_experts", "top_k", "rngs"))


def is_linear(name: str) -> bool:
    """Whether the named router has a linear layer, whose matrix the orthogonality loss is of."""
    return issubclass(ROUTERS[name], LinearRouter)


def knows_chances(name: str) -> bool:
    """Whether the named router knows the chances of its choices, which the load loss is of."""
    return "load" in ROUTERS[name].default_losses


@checked(name=lambda _, value: one_of(ROUTERS)("router", value))
def make_router(
    name: str, d_model: int, num_experts: int, *, top_k: int | None = None, rngs: nnx.Rngs, **options: Any
) -> Router:
    """The router of that name in `ROUTERS`.

    Raises:
      ValueError: an unknown name (names the nearest), an option that this router does not have, a bad value.
    """
    known = router_options(name)
    for option, value in options.items():
        if option not in known:
            has = f"its options are {', '.join(known)}" if known else "it has none"
            raise BadOption(option, value, f"router {name} has no such option; {has}")
    return ROUTERS[name](d_model, num_experts, top_k=top_k, rngs=rngs, **options)
