"""Swipe: every device gets its share of the choices, the overflow of one goes to others.

Shapes: T tokens of one group, D model width, E experts, K experts per token, P logical devices, L experts per device.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.arguments import checked
from moejax.routing.capacity import ceil_share
from moejax.routing.decision import (
    Routing,
    combine_weights,
    keep_decision,
    only_valid,
    softmax_top_k,
    valid_tokens,
)
from moejax.routing.groups import by_group
from moejax.routing.router import BadOption, LinearRouter


class Swipe(LinearRouter):
    """Top-k with a budget of choices per device; what exceeds it is re-assigned (FastMoE's Swipe gate).

    The experts are cut into P consecutive parts, the logical devices. Choices are placed first choices first, in the
    order of the tokens; one that finds its device full goes to the next device that is not, there to the token's best
    expert that it does not have yet (-1 if there is none). Unlike FastMoE's, no token gets an expert twice, and nothing
    depends on how many devices there really are. In evaluation it is plain top-k.

    Args:
      devices: P.
      budget_factor: budget of a device as a multiple of its even share, K * tokens / P.
      groups: see `Capacity`; each group has budgets of its own.
      normalize, router_bias: as for `TopK`.
    """

    default_losses: ClassVar[dict[str, float]] = {"z": 0.001}

    @checked()
    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        devices: int = 1,
        budget_factor: float = 1.0,
        groups: int = 1,
        normalize: bool | None = None,
        router_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, num_experts, top_k, router_bias, rngs)
        if num_experts % devices:
            raise BadOption("devices", devices, f"must divide num_experts ({num_experts})")
        self.devices, self.budget_factor, self.groups = devices, budget_factor, groups
        self.normalize = normalize

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`; nothing is drawn."""
        logits_TE = self.logits(x_TD)
        valid_T = valid_tokens(x_TD, token_mask_T, token_ids_T)
        wanted_TK, weights_TK, scores_TE = softmax_top_k(logits_TE, self.top_k, normalize=self.normalize)
        wanted_TK = only_valid(wanted_TK, valid_T)
        if key is None:
            return Routing(wanted_TK, weights_TK, logits_TE, scores_TE, valid_T)
        ids_TK = keep_decision(by_group(self._assign, self.groups, logits_TE, valid_T))
        dropped_T = jnp.sum((wanted_TK >= 0) & (ids_TK < 0), axis=1, dtype=jnp.int32)
        weights_TK = combine_weights(logits_TE, scores_TE, ids_TK, self.normalize)
        return Routing(ids_TK, weights_TK, logits_TE, scores_TE, valid_T, wanted_TK, dropped_T)

    def _assign(self, logits_TE: jax.Array, valid_T: jax.Array) -> jax.Array:
        devices_P = jnp.arange(self.devices)
        experts_E = jnp.arange(self.num_experts)
        device_E = experts_E // (self.num_experts // self.devices)
        budget = ceil_share(self.top_k * self.budget_factor / self.devices, jnp.sum(valid_T))
        free_P = jnp.full(devices_P.shape, budget)
        left_TE = jnp.where(valid_T[:, None], logits_TE, -jnp.inf)
        ids = []
        for _ in range(self.top_k):
            wanted_T, wants_T = jnp.argmax(left_TE, axis=1), jnp.max(left_TE, axis=1) > -jnp.inf
            at_TP = (device_E[wanted_T][:, None] == devices_P[None, :]) & wants_T[:, None]
            fits_T = jnp.any(at_TP & (jnp.cumsum(at_TP, axis=0) <= free_P[None, :]), axis=1)
            free_P = free_P - jnp.sum(at_TP & fits_T[:, None], axis=0)

            overflow_T = wants_T & ~fits_T
            slot_T = jnp.cumsum(overflow_T) - 1
            device_T = jnp.sum(slot_T[:, None] >= jnp.cumsum(free_P)[None, :], axis=1)
            there_TE = jnp.where(device_E[None, :] == device_T[:, None], left_TE, -jnp.inf)
            moves_T = overflow_T & (device_T < self.devices)
            free_P = free_P - jnp.sum((device_T[:, None] == devices_P[None, :]) & moves_T[:, None], axis=0)
            moves_T &= jnp.max(there_TE, axis=1) > -jnp.inf

            id_T = jnp.where(fits_T, wanted_T, jnp.where(moves_T, jnp.argmax(there_TE, axis=1), -1))
            left_TE = jnp.where(id_T[:, None] == experts_E[None, :], -jnp.inf, left_TE)
            ids.append(id_T)
        return jnp.stack(ids, axis=1).astype(jnp.int32)
