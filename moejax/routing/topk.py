"""Softmax over all experts, the K largest chosen.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import jax
from flax import nnx

from moejax.arguments import checked
from moejax.routing.decision import Routing, combine_weights, only_valid, top_k_ids, valid_tokens
from moejax.routing.expert_groups import ExpertGroups
from moejax.routing.router import LinearRouter


class TopK(LinearRouter):
    """Top-k of a linear layer's logits, weighted by their softmax (Shazeer et al. 2017, without the noise).

    Args:
      normalize: a token's weights sum to one, which equals a softmax over the K chosen logits (Mixtral, Qwen3);
        otherwise they are the softmax over all experts (OLMoE). None: where K > 1.
      expert_groups, limit_groups: cut the experts into groups and choose within `limit_groups` of them only, those of
        the largest best score (DeepSeek-V2, section 2.2.2: device-limited routing).
      scale: factor on the weights, normalised or not (DeepSeek-V2's checkpoints have 16, on weights that are not).
      router_bias: add a learned bias to the logits.
    """

    @checked()
    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        normalize: bool | None = None,
        expert_groups: int = 1,
        limit_groups: int | None = None,
        scale: float = 1.0,
        router_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, num_experts, top_k, router_bias, rngs)
        self.expert_groups = ExpertGroups.of_options(
            expert_groups, limit_groups, best=1, num_experts=num_experts, top_k=self.top_k
        )
        self.scale = scale
        self.normalize = self.top_k > 1 if normalize is None else normalize

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`; nothing is drawn."""
        logits_TE = self.logits(x_TD)
        valid_T = valid_tokens(x_TD, token_mask_T, token_ids_T)
        ids_TK = top_k_ids(self.expert_groups.open_to(logits_TE), self.top_k)
        scores_TE = jax.nn.softmax(logits_TE, axis=-1)
        weights_TK = self.scale * combine_weights(logits_TE, scores_TE, ids_TK, self.normalize)
        return Routing(only_valid(ids_TK, valid_T), weights_TK, logits_TE, scores_TE, valid_T)
