"""From the tokens that each expert takes to the experts of each token.

Shapes: T tokens of one group, E experts, K experts per token at most.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def choices_of_takes(takes_TE: jax.Array, scores_TE: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """ids_TK of the `most` best-scored experts among those that take the token (-1: none), and how many it lost."""
    scores_TK, ids_TK = jax.lax.top_k(jnp.where(takes_TE, scores_TE, -jnp.inf), most)
    ids_TK = jnp.where(scores_TK > -jnp.inf, ids_TK, -1)
    lost_T = jnp.sum(takes_TE, axis=1, dtype=jnp.int32) - jnp.sum(ids_TK >= 0, axis=1, dtype=jnp.int32)
    return ids_TK, lost_T


def rank_of_tokens(*keys_TE: jax.Array) -> jax.Array:
    """Place of each token in its expert's column, sorted by the keys ascending, then by position: [T, E] i32."""
    num_tokens, num_experts = keys_TE[0].shape
    position_TE = jnp.broadcast_to(jnp.arange(num_tokens)[:, None], (num_tokens, num_experts))
    *_, order_TE = jax.lax.sort([*keys_TE, position_TE], dimension=0, num_keys=len(keys_TE) + 1)
    columns_E = jnp.arange(num_experts)[None, :]
    return jnp.zeros_like(order_TE).at[order_TE, columns_E].set(position_TE, unique_indices=True)
