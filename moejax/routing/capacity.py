"""Capacity: how many choices of a group of tokens one expert accepts, and which.

Shapes: T tokens of one group, E experts, K experts per token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from custom_ops.checks import one_of
from moejax.routing.decision import keep_decision
from moejax.routing.groups import by_group, draw

DROP_BY = ("position", "score", "random")


class Capacity(nnx.Module):
    """At most ceil(factor * K * tokens / E) choices per expert and group; the rest is dropped (GShard, Switch).

    Args:
      factor: in training (with a key); `eval_factor`: otherwise.
      drop_by: who is served first: "position": all first choices, then all second ones, each in the order of the
        tokens (GShard, algorithm 1); "score": the largest weights (batch priority, Riquelme et al. 2021, section 3.2);
        "random".
      groups: G; consecutive tokens of the global batch.
    """

    def __init__(self, factor: float, eval_factor: float, drop_by: str, groups: int):
        one_of(DROP_BY)("drop_by", drop_by)
        self.factor, self.eval_factor, self.drop_by, self.groups = factor, eval_factor, drop_by, groups

    def __call__(
        self, ids_TK: jax.Array, weights_TK: jax.Array, num_experts: int, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Choices with -1 where dropped, and how many each token lost."""
        factor = self.eval_factor if key is None else self.factor
        num_tokens, top_k = ids_TK.shape
        if self.drop_by == "score":
            priority_TK = -weights_TK
        elif self.drop_by == "random" and key is not None:
            priority_TK = draw(jax.random.uniform, key, num_tokens, (top_k,))
        else:
            priority_TK = jnp.zeros(ids_TK.shape, jnp.float32)

        def decide(ids_TK, priority_TK):
            tokens = jnp.sum(jnp.any(ids_TK >= 0, axis=1))
            limit = ceil_share(factor * top_k / num_experts, tokens)
            return within_limit(ids_TK, priority_TK, jnp.maximum(limit, 1))

        kept_TK = by_group(decide, self.groups, ids_TK, priority_TK, training=key is not None)
        dropped_T = jnp.sum((ids_TK >= 0) & ~kept_TK, axis=1, dtype=jnp.int32)
        return keep_decision(jnp.where(kept_TK, ids_TK, -1)), dropped_T


def ceil_share(share: float, count: jax.Array) -> jax.Array:
    """ceil(share * count), i32, for an integer count; f32 rounding does not carry an exact product over the edge."""
    return jnp.ceil(jnp.float32(share * (1 - 1e-6)) * count.astype(jnp.float32)).astype(jnp.int32)


def within_limit(ids_TK: jax.Array, priority_TK: jax.Array, limit: jax.Array) -> jax.Array:
    """Which choices are among the first `limit` of their expert: smallest priority, then first choices, then position.

    Never True for -1.
    """
    num_tokens, top_k = ids_TK.shape
    position_TK = jnp.arange(num_tokens)[:, None] + num_tokens * jnp.arange(top_k)[None, :]
    columns = (ids_TK, priority_TK, position_TK)
    ids_N, _, position_N = jax.lax.sort([c.reshape(-1) for c in columns], num_keys=3)
    rank_N = jnp.arange(ids_N.size) - jnp.searchsorted(ids_N, ids_N, side="left")
    kept_N = (ids_N >= 0) & (rank_N < limit)
    kept_KT = jnp.zeros(ids_N.shape, bool).at[position_N].set(kept_N, unique_indices=True)
    return kept_KT.reshape(top_k, num_tokens).T
