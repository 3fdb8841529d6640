"""What the layer asks of any router, a user's own above all; checked while tracing, at no cost at run time."""

from __future__ import annotations

import jax.numpy as jnp

from moejax.routing.decision import Routing


def check_routing(routing: object, num_tokens: int, num_experts: int) -> None:
    """Refuse what is no `Routing` of these many tokens and experts.

    Raises:
      ValueError: names the field, what it should be, and what it is.
    """
    if not isinstance(routing, Routing):
        raise ValueError(f"the router must return a moejax.Routing, got {type(routing).__name__}")
    if routing.ids_TK.ndim != 2:
        raise ValueError(f"Routing.ids_TK: must be [T, K], got shape {routing.ids_TK.shape}")
    top_k = routing.ids_TK.shape[1]
    integer, real, truth = jnp.integer, jnp.floating, jnp.bool_
    rules = {
        "ids_TK": ((num_tokens, top_k), integer),
        "weights_TK": ((num_tokens, top_k), real),
        "logits_TE": ((num_tokens, num_experts), real),
        "scores_TE": ((num_tokens, num_experts), real),
        "valid_T": ((num_tokens,), truth),
        "dropped_T": ((num_tokens,), integer),
        "chance_TE": ((num_tokens, num_experts), real),
    }
    for name, (shape, kind) in rules.items():
        value = getattr(routing, name)
        if value is None:
            continue
        if value.shape != shape or not jnp.issubdtype(value.dtype, kind):
            rule = f"{kind.__name__}{list(shape)}"
            raise ValueError(f"Routing.{name}: must be {rule}, got {value.dtype}{list(value.shape)}")
