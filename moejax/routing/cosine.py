"""Cosine router: experts are points on a sphere.

Shapes: T tokens, D model width, E experts, K experts per token, R width of the sphere's space.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from custom_ops.checks import require
from moejax.arguments import checked
from moejax.layers import init_matrix
from moejax.routing.decision import Routing, only_valid, softmax_top_k, valid_tokens
from moejax.routing.router import Router


class Cosine(Router):
    """Top-k of exp(s) * cos(x @ w, point of the expert), with a learned s (Chi et al. 2022, eq. 3-4; Tutel).

    Args:
      projection: R. None: half the number of experts, at least 8, as far as D goes.
      normalize: as for `TopK`.
    """

    _LARGEST = math.log(100.0)  # of s: the smallest temperature is 0.01

    @checked()
    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        projection: int | None = None,
        normalize: bool | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(num_experts, top_k)
        width = min(max(num_experts // 2, 8), d_model) if projection is None else projection
        self.normalize = normalize
        self.w_DR = init_matrix(rngs, (d_model, width), axes=("embed", "router"), std=d_model**-0.5)
        self.points_RE = init_matrix(rngs, (width, num_experts), axes=("router", "router"), std=width**-0.5)
        self.log_scale = nnx.Param(jnp.float32(math.log(1 / 0.3)), axes=())

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`; nothing is drawn."""
        width = self.w_DR.shape[0]
        require(
            x_TD.shape[1] == width, "x_TD", x_TD, f"must be [T, {width}], as wide as the router's d_model"
        )
        directions_TR = _unit(jnp.dot(x_TD.astype(jnp.float32), self.w_DR[...]), axis=1)
        cosine_TE = jnp.dot(directions_TR, _unit(self.points_RE[...], axis=0))
        logits_TE = cosine_TE * jnp.exp(jnp.minimum(self.log_scale[...], self._LARGEST))
        valid_T = valid_tokens(x_TD, token_mask_T, token_ids_T)
        ids_TK, weights_TK, scores_TE = softmax_top_k(logits_TE, self.top_k, normalize=self.normalize)
        return Routing(only_valid(ids_TK, valid_T), weights_TK, logits_TE, scores_TE, valid_T)


def _unit(x: jax.Array, axis: int) -> jax.Array:
    """x / |x|; zero, with a finite gradient, where x is."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=axis, keepdims=True), 1e-24))
