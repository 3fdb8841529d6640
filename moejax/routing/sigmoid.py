"""Sigmoid scores, balanced without a loss by a bias that only the choice sees.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.arguments import checked
from moejax.routing.decision import Routing, only_valid, pick, softmax_of_chosen, top_k_ids, valid_tokens
from moejax.routing.expert_groups import ExpertGroups
from moejax.routing.router import LinearRouter, RouterState


class Sigmoid(LinearRouter):
    """Top-k of sigmoid(x @ w) + bias, weighted by the sigmoids alone (DeepSeek-V3, eq. 13-16).

    The bias has no gradient: after each step `balance` raises it for experts with less than the mean load and lowers
    it for the others (Wang et al. 2024, algorithm 1).

    Args:
      normalize: a token's weights sum to `scale`; otherwise they are `scale` times the sigmoids. None: where K > 1.
      bias_rate: step of the bias; 0 leaves it.
      expert_groups, limit_groups: cut the experts into groups and choose within `limit_groups` of them only, those of
        the largest sum of two best scores (DeepSeek-V3, section 2.1.2: node-limited routing).
      scale: factor on the weights (DeepSeek-V3's checkpoints have 2.5).
      router_bias: add a learned bias to the logits.
    """

    # The bias balances; the loss is only to be asked for, for instance per sequence with a weight of 1e-4.
    default_losses: ClassVar[dict[str, float]] = {}

    @checked()
    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        normalize: bool | None = None,
        bias_rate: float = 1e-3,
        expert_groups: int = 1,
        limit_groups: int | None = None,
        scale: float = 1.0,
        router_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, num_experts, top_k, router_bias, rngs)
        self.expert_groups = ExpertGroups.of_options(
            expert_groups, limit_groups, best=2, num_experts=num_experts, top_k=self.top_k
        )
        self.bias_rate, self.scale = bias_rate, scale
        self.normalize = self.top_k > 1 if normalize is None else normalize
        self.selection_bias_E = RouterState(jnp.zeros((num_experts,), jnp.float32), axes=("router",))

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`; nothing is drawn."""
        logits_TE = self.logits(x_TD)
        valid_T = valid_tokens(x_TD, token_mask_T, token_ids_T)
        sigmoid_TE = jax.nn.sigmoid(logits_TE)
        ids_TK = top_k_ids(
            self.expert_groups.open_to(sigmoid_TE + self.selection_bias_E[...][None, :]), self.top_k
        )
        ids_TK = only_valid(ids_TK, valid_T)
        log_sigmoid_TE = jax.nn.log_sigmoid(logits_TE)
        weights_TK = self.scale * (
            # s / sum(s) is the softmax of log(s), which has all its digits also where s has none left.
            softmax_of_chosen(log_sigmoid_TE, ids_TK) if self.normalize else pick(sigmoid_TE, ids_TK)
        )
        return Routing(ids_TK, weights_TK, logits_TE, jax.nn.softmax(log_sigmoid_TE, axis=-1), valid_T)

    def balance(self, load_E: jax.Array) -> None:
        """bias += rate * sign(mean load - load)."""
        super().balance(load_E)
        load_E = load_E.astype(jnp.float32)
        self.selection_bias_E[...] += self.bias_rate * jnp.sign(jnp.mean(load_E) - load_E)
