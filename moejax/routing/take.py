"""From the tokens that each expert takes to the experts of each token.

Shapes: T tokens of one group, E experts, K experts per token at most.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from custom_ops.varying import vary_like


def choices_of_takes(takes_TE: jax.Array, scores_TE: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """ids_TK of the `most` best-scored experts among those that take the token (-1: none), and how many it lost."""
    scores_TK, ids_TK = jax.lax.top_k(jnp.where(takes_TE, scores_TE, -jnp.inf), most)
    ids_TK = jnp.where(scores_TK > -jnp.inf, ids_TK, -1)
    lost_T = jnp.sum(takes_TE, axis=1, dtype=jnp.int32) - jnp.sum(ids_TK >= 0, axis=1, dtype=jnp.int32)
    return ids_TK, lost_T


def best_of_columns(
    scores_TE: jax.Array, first_TE: jax.Array, valid_T: jax.Array, count_E: jax.Array
) -> jax.Array:
    """Which tokens are among the best `count_E` of their expert's column: [T, E] bool.

    First those of `first_TE`, then by score, then by position; never those that are not valid. Found by bisection, for
    all columns at once: on a CPU a third of what sorting them takes.

    Args:
      scores_TE: f32 from 0 to 1, whose bits are in the order of the numbers.
    """
    bits_TE = jax.lax.bitcast_convert_type(scores_TE.astype(jnp.float32), jnp.int32) + 1  # at most 2**30
    keys_TE = jnp.where(valid_T[:, None], bits_TE + (first_TE.astype(jnp.int32) << 30), 0)
    least_E = _least_of_best(keys_TE, count_E, 31)
    above_TE = keys_TE > least_E[None, :]
    left_E = count_E - jnp.sum(above_TE, axis=0, dtype=jnp.int32)
    # Of those with the very last key, the first ones.
    num_tokens = keys_TE.shape[0]
    from_behind_T = num_tokens - jnp.arange(num_tokens, dtype=jnp.int32)
    order_TE = jnp.where(keys_TE == least_E[None, :], from_behind_T[:, None], 0)
    last_E = _least_of_best(order_TE, left_E, num_tokens.bit_length())
    equal_TE = (order_TE > 0) & (order_TE >= last_E[None, :]) & (left_E > 0)[None, :]
    return (above_TE | equal_TE) & valid_T[:, None]


def _least_of_best(keys_TE: jax.Array, count_E: jax.Array, bits: int) -> jax.Array:
    """The largest number below 2**bits that at least `count_E` keys of the column reach; 0 if there are too few."""

    def refine(step, least_E):
        higher_E = least_E | (1 << (bits - 1 - step))
        reach_E = jnp.sum(keys_TE >= higher_E[None, :], axis=0, dtype=jnp.int32)
        return jnp.where(reach_E >= count_E, higher_E, least_E)

    start_E = vary_like(jnp.zeros(keys_TE.shape[1:], jnp.int32), keys_TE, count_E)
    return jax.lax.fori_loop(0, bits, refine, start_E)
