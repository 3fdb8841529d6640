"""Expert choice: each expert takes the tokens it scores highest.

Shapes: T tokens, D model width, E experts, K experts per token at most.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.arguments import checked
from moejax.routing.capacity import ceil_share
from moejax.routing.decision import Routing, keep_decision, pick, valid_tokens
from moejax.routing.groups import by_group
from moejax.routing.router import BadOption, LinearRouter
from moejax.routing.take import best_of_columns, choices_of_takes


class ExpertChoice(LinearRouter):
    """Each expert takes its ceil(capacity_factor * top_k * tokens / E) best tokens (Zhou et al. 2022, eq. 1-2).

    Perfectly balanced without a loss. NOT causal: whether a token is taken depends on the tokens after it, in training
    and in evaluation, so that the loss of a language model looks better than what it can generate.

    Args:
      top_k: experts per token on average.
      max_experts: most experts of one token; those it scores lower lose it, which counts as dropped. None: 4 * top_k.
      capacity_factor: in training; `eval_capacity_factor`: in evaluation, None: the same.
      groups: see `Capacity`.
      router_bias: add a learned bias to the logits.
    """

    default_losses: ClassVar[dict[str, float]] = {"z": 0.001}

    @checked()
    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        max_experts: int | None = None,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float | None = None,
        groups: int = 1,
        router_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, num_experts, top_k, router_bias, rngs)
        self.max_experts = min(4 * self.top_k, num_experts) if max_experts is None else max_experts
        if not 1 <= self.max_experts <= num_experts:
            rule = f"must be between 1 and num_experts ({num_experts})"
            raise BadOption("max_experts", max_experts, rule)
        eval_factor = capacity_factor if eval_capacity_factor is None else eval_capacity_factor
        self.capacity_factor, self.eval_factor, self.groups = capacity_factor, eval_factor, groups

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`; nothing is drawn."""
        logits_TE = self.logits(x_TD)
        valid_T = valid_tokens(x_TD, token_mask_T, token_ids_T)
        scores_TE = jax.nn.softmax(logits_TE, axis=-1)
        factor = self.eval_factor if key is None else self.capacity_factor
        share = factor * self.top_k / self.num_experts

        def decide(scores_TE, valid_T):
            tokens = jnp.sum(valid_T)
            limit = jnp.clip(ceil_share(share, tokens), 1, tokens)
            limit_E = jnp.full(scores_TE.shape[1:], limit, jnp.int32)
            takes_TE = best_of_columns(scores_TE, jnp.zeros_like(scores_TE, bool), valid_T, limit_E)
            return choices_of_takes(takes_TE, scores_TE, self.max_experts)

        ids_TK, dropped_T = by_group(decide, self.groups, scores_TE, valid_T, training=key is not None)
        ids_TK = keep_decision(ids_TK)
        weights_TK = pick(scores_TE, ids_TK)
        return Routing(ids_TK, weights_TK, logits_TE, scores_TE, valid_T, dropped_T=dropped_T)
