"""Softmax over all experts, the K largest chosen.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from flax import nnx

from moejax.arguments import checked
from moejax.routing.decision import Routing, only_valid, softmax_top_k, valid_tokens
from moejax.routing.router import LinearRouter


class TopK(LinearRouter):
    """Top-k of a linear layer's logits, weighted by their softmax (Shazeer et al. 2017, without the noise).

    Args:
      normalize: a token's weights sum to one, which equals a softmax over the K chosen logits (Mixtral, Qwen3);
        otherwise they are the softmax over all experts (OLMoE). None: where K > 1.
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
        router_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, num_experts, top_k, router_bias, rngs)
        self.normalize = self.top_k > 1 if normalize is None else normalize

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`; nothing is drawn."""
        logits_TE = self.logits(x_TD)
        valid_T = valid_tokens(x_TD, token_mask_T)
        ids_TK, weights_TK, scores_TE = softmax_top_k(logits_TE, self.top_k, normalize=self.normalize)
        return Routing(only_valid(ids_TK, valid_T), weights_TK, logits_TE, scores_TE, valid_T)
