"""What all routers have in common.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from custom_ops.checks import BadArgument, array, require, require_shape
from moejax.arguments import checked
from moejax.layers import init_matrix
from moejax.routing.decision import Routing

BadOption = BadArgument  # as the routers and their callers name it


class RouterState(nnx.Variable):
    """What a router learns without a gradient: saved with the parameters, not touched by the optimizer."""


class Router(nnx.Module):
    """Base of the routers: `router(x_TD, token_mask_T=, token_ids_T=, key=) -> Routing`.

    A key means training: random choices are drawn, and capacities and budgets of training hold. Without a key nothing
    is drawn and the choice of a token does not depend on other tokens, except where a capacity of evaluation or an
    expert's choice says so.
    """

    default_top_k: ClassVar[int] = 2
    only_top_k: ClassVar[int | None] = None
    # Weights of the losses where the layer is not told.
    default_losses: ClassVar[dict[str, float]] = {"balance": 0.01, "z": 0.001}

    @checked()
    def __init__(self, num_experts: int, top_k: int | None):
        self.num_experts = num_experts
        self.top_k = self.default_top_k if top_k is None else top_k
        if self.only_top_k is not None and self.top_k != self.only_top_k:
            raise BadOption("top_k", top_k, f"must be {self.only_top_k} for this router, or unset")
        if not 1 <= self.top_k <= num_experts:
            raise BadOption("top_k", self.top_k, f"must be between 1 and num_experts ({num_experts})")

    def __call__(
        self,
        x_TD: jax.Array,
        *,
        token_mask_T: jax.Array | None = None,
        token_ids_T: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Routing:
        """Route, in f32 whatever the dtype of x."""
        raise NotImplementedError(f"{type(self).__name__} must say in __call__ how tokens choose")

    @checked(load_E=array("[E]"))
    def balance(self, load_E: jax.Array) -> None:
        """Change the router's state after an optimizer step, given the choices per expert of the global batch.

        This one refuses another number of experts, and changes nothing.
        """
        require_shape("load_E", load_E, (self.num_experts,), "choices of each of the router's experts")


class LinearRouter(Router):
    """Base of routers whose logits are x @ w, plus a learned bias with `router_bias`."""

    def __init__(self, d_model: int, num_experts: int, top_k: int | None, router_bias: bool, rngs: nnx.Rngs):
        super().__init__(num_experts, top_k)
        self.w_DE = init_matrix(rngs, (d_model, num_experts), axes=("embed", "router"), std=d_model**-0.5)
        self.b_E = (
            nnx.Param(jnp.zeros((num_experts,), jnp.float32), axes=("router",)) if router_bias else None
        )

    def logits(self, x_TD: jax.Array) -> jax.Array:
        """[T, D] -> [T, E] f32."""
        width = self.w_DE.shape[0]
        require(
            x_TD.shape[1] == width, "x_TD", x_TD, f"must be [T, {width}], as wide as the router's d_model"
        )
        logits_TE = jnp.dot(x_TD.astype(jnp.float32), self.w_DE[...])
        return logits_TE if self.b_E is None else logits_TE + self.b_E[...][None, :]
