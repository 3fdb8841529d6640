"""Sinkhorn: an assignment of tokens to experts that is balanced by itself.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.arguments import checked
from moejax.routing.decision import (
    Routing,
    combine_weights,
    keep_decision,
    only_valid,
    top_k_ids,
    valid_tokens,
)
from moejax.routing.groups import by_group
from moejax.routing.router import LinearRouter


class Sinkhorn(LinearRouter):
    """Top-k of the transport plan that gives every expert the same mass (S-BASE, Clark et al. 2022, section 3.2).

    The plan is found by `iterations` of Sinkhorn's algorithm in training; evaluation takes the logits, for a token must
    not depend on those after it. Weights are the softmax of the logits.

    Args:
      iterations: of scaling columns to tokens / E and rows to one.
      groups: see `Capacity`; each group is balanced.
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
        iterations: int = 8,
        groups: int = 1,
        normalize: bool | None = None,
        router_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, num_experts, top_k, router_bias, rngs)
        self.iterations, self.groups, self.normalize = iterations, groups, normalize

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`; nothing is drawn."""
        logits_TE = self.logits(x_TD)
        valid_T = valid_tokens(x_TD, token_mask_T, token_ids_T)
        if key is None:
            ids_TK = top_k_ids(logits_TE, self.top_k)
        else:
            decide = lambda logits_TE, valid_T: top_k_ids(self._plan(logits_TE, valid_T), self.top_k)  # noqa: E731
            ids_TK = keep_decision(by_group(decide, self.groups, logits_TE, valid_T))
        ids_TK = only_valid(ids_TK, valid_T)
        scores_TE = jax.nn.softmax(logits_TE, axis=-1)
        weights_TK = combine_weights(logits_TE, scores_TE, ids_TK, self.normalize)
        return Routing(ids_TK, weights_TK, logits_TE, scores_TE, valid_T)

    def _plan(self, logits_TE: jax.Array, valid_T: jax.Array) -> jax.Array:
        """Logarithm of the plan, up to a constant per token, which does not change the token's choice."""
        logits_TE = jnp.where(valid_T[:, None], logits_TE, -jnp.inf)

        def scale(_, column_E):
            row_T = -jax.nn.logsumexp(logits_TE + column_E[None, :], axis=1)
            row_T = jnp.where(valid_T, row_T, 0)
            mass_E = jax.nn.logsumexp(logits_TE + row_T[:, None], axis=0)
            return jnp.where(mass_E > -jnp.inf, -mass_E, 0)

        start_E = jnp.zeros_like(logits_TE[0])
        return logits_TE + jax.lax.fori_loop(0, self.iterations, scale, start_E)[None, :]
