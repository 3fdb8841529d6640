"""Token rounding: every expert gets a multiple of the grouped product's tile of tokens.

Shapes: T tokens, D model width, E experts, K experts per token at most.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from custom_ops.checks import one_of
from moejax.arguments import checked
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
from moejax.routing.take import best_of_columns, choices_of_takes

ROUNDINGS = ("nearest", "up", "down")


class RoundedTopK(LinearRouter):
    """Top-k, then per expert the best of those who chose it, filled up with the best who did not, to whole tiles.

    After SonicMoE's token rounding (Guo et al. 2025): no row of a tile is padding. In evaluation it is plain top-k.

    Args:
      tile: rows of a tile.
      rounding: of each expert's number of tokens to a multiple of `tile`: "nearest", "up", "down".
      max_experts: most experts of one token; those it scores lower lose it, which counts as dropped and leaves their
        tile unfilled. None: 2 * top_k.
      normalize, router_bias: as for `TopK`.
      groups: see `Capacity`.
    """

    @checked(rounding=one_of(ROUNDINGS))
    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        tile: int = 128,
        rounding: str = "nearest",
        max_experts: int | None = None,
        normalize: bool | None = None,
        groups: int = 1,
        router_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, num_experts, top_k, router_bias, rngs)
        self.max_experts = min(2 * self.top_k, num_experts) if max_experts is None else max_experts
        if not self.top_k <= self.max_experts <= num_experts:
            rule = f"must be between top_k ({self.top_k}) and num_experts ({num_experts})"
            raise BadOption("max_experts", max_experts, rule)
        self.tile, self.rounding, self.groups = tile, rounding, groups
        self.normalize = self.top_k > 1 if normalize is None else normalize

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`; nothing is drawn."""
        logits_TE = self.logits(x_TD)
        valid_T = valid_tokens(x_TD, token_mask_T, token_ids_T)
        ids_TK, weights_TK, scores_TE = softmax_top_k(logits_TE, self.top_k, normalize=self.normalize)
        ids_TK = only_valid(ids_TK, valid_T)
        if key is None:
            return Routing(ids_TK, weights_TK, logits_TE, scores_TE, valid_T)
        wanted_TK = ids_TK

        def decide(wanted_TK, scores_TE, valid_T):
            experts_E = jnp.arange(self.num_experts)
            wanted_TE = jnp.any(wanted_TK[:, :, None] == experts_E[None, None, :], axis=1)
            target_E = self._round(jnp.sum(wanted_TE, axis=0, dtype=jnp.int32))
            takes_TE = best_of_columns(scores_TE, wanted_TE, valid_T, target_E)
            ids_TK, lost_T = choices_of_takes(takes_TE, scores_TE, self.max_experts)
            return ids_TK, lost_T + jnp.sum(wanted_TE & ~takes_TE, axis=1, dtype=jnp.int32)

        ids_TK, dropped_T = by_group(decide, self.groups, wanted_TK, scores_TE, valid_T)
        ids_TK = keep_decision(ids_TK)
        weights_TK = combine_weights(logits_TE, scores_TE, ids_TK, self.normalize)
        return Routing(ids_TK, weights_TK, logits_TE, scores_TE, valid_T, wanted_TK, dropped_T)

    def _round(self, count_E: jax.Array) -> jax.Array:
        if self.rounding == "up":
            count_E = count_E + self.tile - 1
        elif self.rounding == "nearest":
            count_E = count_E + self.tile // 2
        return count_E // self.tile * self.tile
