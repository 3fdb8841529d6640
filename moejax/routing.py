"""Routers: which experts each token goes to, and with which weights.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax.layers import init_matrix

ROUTING_DECISION = "moejax_routing_decision"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """A router's decision.

    Fields:
      ids_TK: expert of each choice, i32; -1 for none.
      weights_TK: weight of that expert's output, f32.
      logits_TE: the router's raw scores, f32; for the z-loss and statistics.
      scores_TE: non-negative scores that sum to one over the experts; for the balance loss.
      valid_T: bool, False where the token is masked: it goes nowhere and counts nowhere.
    """

    ids_TK: jax.Array
    weights_TK: jax.Array
    logits_TE: jax.Array
    scores_TE: jax.Array
    valid_T: jax.Array


class TopK(nnx.Module):
    """Softmax over all experts, the K largest chosen (Shazeer et al. 2017; OLMoE, Mixtral, Qwen3).

    With `normalize` a token's weights sum to one, which equals a softmax over the K chosen logits. By default they do
    for K > 1; a single weight would become the constant 1 and leave the router without a gradient (Switch
    Transformer, section 2.1).
    """

    default_top_k = 2

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        normalize: bool | None = None,
        rngs: nnx.Rngs,
    ):
        self.top_k = self.default_top_k if top_k is None else top_k
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(f"top_k = {self.top_k}: must be between 1 and num_experts ({num_experts})")
        self.normalize = self.top_k > 1 if normalize is None else normalize
        self.w_DE = init_matrix(rngs, (d_model, num_experts), axes=("embed", "router"), std=d_model**-0.5)

    def __call__(
        self,
        x_TD: jax.Array,
        *,
        token_mask_T: jax.Array | None = None,
        token_ids_T: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> Routing:
        """Route, in f32 whatever the dtype of x. `token_ids_T` and `key` are not needed here."""
        logits_TE = jnp.dot(x_TD.astype(jnp.float32), self.w_DE[...])
        valid_T = jnp.ones(x_TD.shape[:1], bool) if token_mask_T is None else token_mask_T
        ids_TK, weights_TK, scores_TE = softmax_top_k(logits_TE, self.top_k, normalize=self.normalize)
        return Routing(jnp.where(valid_T[:, None], ids_TK, -1), weights_TK, logits_TE, scores_TE, valid_T)


def softmax_top_k(
    logits_TE: jax.Array, top_k: int, *, normalize: bool | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The K experts of largest logit: ids_TK, their weights_TK, and the softmax scores_TE over all experts.

    With `normalize` a token's weights sum to one; by default they do where K > 1.
    """
    normalize = top_k > 1 if normalize is None else normalize
    scores_TE = jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1)
    ids_TK = keep_decision(jax.lax.top_k(jax.lax.stop_gradient(logits_TE), top_k)[1])
    # By comparison, so that the gradient is no scatter.
    chosen_TKE = ids_TK[:, :, None] == jnp.arange(logits_TE.shape[1], dtype=ids_TK.dtype)[None, None, :]
    weights_TK = jnp.sum(jnp.where(chosen_TKE, scores_TE[:, None, :], 0), axis=-1)
    if normalize:
        weights_TK = weights_TK / jnp.sum(weights_TK, axis=-1, keepdims=True)
    return ids_TK, weights_TK, scores_TE


def keep_decision(ids_TK: jax.Array) -> jax.Array:
    """Name a routing decision so that every remat policy saves it: computed again, rounding could flip it."""
    return checkpoint_name(ids_TK, ROUTING_DECISION)


ROUTERS = {"topk": TopK}
