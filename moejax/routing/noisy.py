"""Noisy top-k: a learned amount of noise on the logits spreads tokens in training.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.arguments import checked
from moejax.normal import normal_cdf
from moejax.routing.decision import Routing, combine_weights, only_valid, pick, top_k_ids, valid_tokens
from moejax.routing.groups import draw
from moejax.routing.router import LinearRouter


class NoisyTopK(LinearRouter):
    """H(x) = x @ w + normal * softplus(x @ w_noise), the K largest, softmax over them (Shazeer et al. 2017, eq. 3-5).

    Balanced by its importance and load losses. Without a key there is no noise, and no chance to take the load loss
    of.

    Args:
      normalize, router_bias: as for `TopK`.
    """

    default_losses: ClassVar[dict[str, float]] = {"importance": 0.1, "load": 0.1}

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
        self.normalize = normalize
        # Zero, as in the paper's appendix A: every expert begins with the same noise.
        zeros_DE = jnp.zeros((d_model, num_experts), jnp.float32)
        self.w_noise_DE = nnx.Param(zeros_DE, axes=("embed", "router"))

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`."""
        logits_TE = self.logits(x_TD)
        valid_T = valid_tokens(x_TD, token_mask_T, token_ids_T)
        noisy_TE, spread_TE, chance_TE = logits_TE, None, None
        if key is not None:
            spread_TE = jax.nn.softplus(jnp.dot(x_TD.astype(jnp.float32), self.w_noise_DE[...]))
            normal_TE = draw(jax.random.normal, key, x_TD.shape[0], (self.num_experts,))
            noisy_TE = logits_TE + normal_TE * spread_TE
        best_TN = top_k_ids(noisy_TE, min(self.top_k + 1, self.num_experts))  # the runner-up for the chances
        if spread_TE is not None:
            chance_TE = chance_of_choice(logits_TE, noisy_TE, spread_TE, best_TN, self.top_k)
        ids_TK = best_TN[:, : self.top_k]
        noisy_scores_TE = jax.nn.softmax(noisy_TE, axis=-1)
        weights_TK = combine_weights(noisy_TE, noisy_scores_TE, ids_TK, self.normalize)
        scores_TE = jax.nn.softmax(logits_TE, axis=-1)
        ids_TK = only_valid(ids_TK, valid_T)
        return Routing(ids_TK, weights_TK, logits_TE, scores_TE, valid_T, chance_TE=chance_TE)


def chance_of_choice(
    logits_TE: jax.Array, noisy_TE: jax.Array, spread_TE: jax.Array, best_TN: jax.Array, top_k: int
) -> jax.Array:
    """P(x, e): chance that e is among the K largest if only its own noise is drawn again (Shazeer et al., eq. 8-9).

    Args:
      best_TN: experts of the K + 1 largest of noisy_TE, from `top_k_ids`.
    """
    num_experts = logits_TE.shape[1]
    if top_k == num_experts:
        return jnp.ones_like(logits_TE)
    # Picked by comparison, for the gradient of what `top_k` gives would be a scatter, slow on CPUs.
    pair_T2 = best_TN[:, top_k - 1 : top_k + 1]
    kth_T1, next_T1 = jnp.split(jnp.where(pair_T2 >= 0, pick(noisy_TE, pair_T2), -jnp.inf), 2, axis=1)
    # An expert competes with the K-th largest of the others.
    rival_TE = jnp.where(noisy_TE > next_T1, next_T1, kth_T1)
    # Where softplus has underflowed, the chance is 0 or 1 and has no slope.
    spread_TE = jnp.maximum(spread_TE, 1e-6)
    return normal_cdf((logits_TE - rival_TE) / spread_TE)
