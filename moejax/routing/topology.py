"""Topology-aware router: few choices leave the node.

Shapes: T tokens of one group, D model width, E experts, K experts per token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.arguments import checked
from moejax.routing.capacity import within_limit
from moejax.routing.decision import (
    Routing,
    combine_weights,
    keep_decision,
    only_valid,
    pick,
    softmax_top_k,
    top_k_ids,
    valid_tokens,
)
from moejax.routing.groups import by_group, token_numbers
from moejax.routing.router import BadOption, LinearRouter


class Topology(LinearRouter):
    """Top-k of which at most a share leaves the node (He et al. 2022, FasterMoE, section 4.3).

    The experts are cut into consecutive parts, one per logical node; the tokens of group g sit on node g mod `nodes`.
    Of the choices that leave the node the best-scored are kept; a token that loses one chooses again within its node.
    Unlike FasterMoE's gate, all choices count, not only first ones. In evaluation it is plain top-k.

    Args:
      nodes: logical nodes; to be of use, the size of the slow mesh axis.
      off_node_share: largest share of a group's choices that leave the node.
      groups: see `Capacity`. None: one per node.
      normalize, router_bias: as for `TopK`.
    """

    @checked()
    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        nodes: int = 1,
        off_node_share: float = 0.14,
        groups: int | None = None,
        normalize: bool | None = None,
        router_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, num_experts, top_k, router_bias, rngs)
        if num_experts % nodes:
            raise BadOption("nodes", nodes, f"must divide num_experts ({num_experts})")
        if num_experts // nodes < self.top_k:
            rule = f"leaves a node {num_experts // nodes} experts, fewer than top_k ({self.top_k})"
            raise BadOption("nodes", nodes, rule)
        self.groups = nodes if groups is None else groups
        if self.groups % nodes:
            raise BadOption("groups", groups, f"must be a multiple of nodes ({nodes})")
        self.nodes, self.off_node_share, self.normalize = nodes, off_node_share, normalize

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`; nothing is drawn."""
        logits_TE = self.logits(x_TD)
        valid_T = valid_tokens(x_TD, token_mask_T, token_ids_T)
        wanted_TK, weights_TK, scores_TE = softmax_top_k(logits_TE, self.top_k, normalize=self.normalize)
        wanted_TK = only_valid(wanted_TK, valid_T)
        if key is None:
            return Routing(wanted_TK, weights_TK, logits_TE, scores_TE, valid_T)
        numbers_T = token_numbers(x_TD.shape[0])
        arrays = (logits_TE, wanted_TK, pick(scores_TE, wanted_TK), numbers_T)
        ids_TK = keep_decision(by_group(self._limit, self.groups, *arrays))
        ids_TK = only_valid(ids_TK, valid_T)
        weights_TK = combine_weights(logits_TE, scores_TE, ids_TK, self.normalize)
        return Routing(ids_TK, weights_TK, logits_TE, scores_TE, valid_T)

    def _limit(self, logits_TE, wanted_TK, score_TK, numbers_T) -> jax.Array:
        experts_E = jnp.arange(self.num_experts)
        per_node = self.num_experts // self.nodes
        node = numbers_T[0] // numbers_T.shape[0] % self.nodes
        leaves_TK = (wanted_TK >= 0) & (wanted_TK // per_node != node)
        choices = jnp.sum(wanted_TK >= 0).astype(jnp.float32)
        limit = jnp.floor(self.off_node_share * choices * (1 + 1e-6)).astype(jnp.int32)
        kept_TK = within_limit(jnp.where(leaves_TK, 0, -1), -score_TK, limit)
        may_leave_TE = jnp.any(
            (wanted_TK[:, :, None] == experts_E[None, None, :]) & kept_TK[:, :, None], axis=1
        )
        allowed_TE = may_leave_TE | (experts_E // per_node == node)[None, :]
        return top_k_ids(jnp.where(allowed_TE, logits_TE, -jnp.inf), self.top_k)
