"""Experts in groups: a token chooses within its best groups only.

Shapes: T tokens, E experts, G groups of experts, L experts per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from moejax.routing.router import BadOption


@dataclass(frozen=True)
class ExpertGroups:
    """Cuts E experts into G consecutive groups and opens `limit` of them to a token (DeepSeek-V2, section 2.2.2).

    Fields:
      groups: G.
      limit: the number of open groups.
      best: a group's score is the sum of its `best` largest scores (DeepSeek-V2: 1; V3, section 2.1.2: 2).
    """

    groups: int
    limit: int
    best: int

    @classmethod
    def of_options(
        cls, expert_groups: int, limit_groups: int | None, *, best: int, num_experts: int, top_k: int
    ) -> ExpertGroups:
        """From a router's options; `limit_groups` None opens all groups.

        Raises:
          BadOption: the groups do not divide the experts, or leave a token fewer than K.
        """
        limit = expert_groups if limit_groups is None else limit_groups
        if expert_groups < 1 or num_experts % expert_groups:
            raise BadOption("expert_groups", expert_groups, f"must divide num_experts ({num_experts})")
        if not 1 <= limit <= expert_groups:
            raise BadOption("limit_groups", limit, f"must be between 1 and expert_groups ({expert_groups})")
        if (there := limit * (num_experts // expert_groups)) < top_k:
            rule = f"leaves a token {there} experts, fewer than top_k ({top_k})"
            raise BadOption("limit_groups", limit, rule)
        return cls(expert_groups, limit, best)

    def open_to(self, scores_TE: jax.Array) -> jax.Array:
        """The scores, -inf for experts of the groups that are closed to the token; no gradient."""
        scores_TE = jax.lax.stop_gradient(scores_TE)
        if self.limit == self.groups:
            return scores_TE
        scores_TGL = scores_TE.reshape(scores_TE.shape[0], self.groups, -1)
        best = min(self.best, scores_TGL.shape[2])
        score_TG = jnp.sum(jax.lax.top_k(scores_TGL, best)[0], axis=-1)
        open_groups = jax.lax.top_k(score_TG, self.limit)[1]
        is_open_TG = jnp.any(open_groups[:, :, None] == jnp.arange(self.groups)[None, None, :], axis=1)
        return jnp.where(is_open_TG[:, :, None], scores_TGL, -jnp.inf).reshape(scores_TE.shape)
