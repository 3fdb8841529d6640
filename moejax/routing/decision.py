"""What a router hands to the layer, and the steps that most routers share.

Shapes: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from custom_ops.checks import require_shape

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
      counted_TK: choices that the balance loss counts, i32, any number per token; None: `ids_TK`. Differs where a
        capacity takes choices away, which must not make the load look balanced.
      dropped_T: choices that the router itself took away from the token, i32; None: it never does.
      chance_TE: probability that the token chooses the expert, f32; for the load loss. None: not known.
    """

    ids_TK: jax.Array
    weights_TK: jax.Array
    logits_TE: jax.Array
    scores_TE: jax.Array
    valid_T: jax.Array
    counted_TK: jax.Array | None = None
    dropped_T: jax.Array | None = None
    chance_TE: jax.Array | None = None


def valid_tokens(x_TD: jax.Array, token_mask_T: jax.Array | None, token_ids_T: jax.Array | None) -> jax.Array:
    """The token mask, or all True; refuses a mask or ids of other tokens."""
    for argument, value in (("token_mask_T", token_mask_T), ("token_ids_T", token_ids_T)):
        if value is not None:
            require_shape(argument, value, x_TD.shape[:1], "one for each token of x_TD")
    return jnp.ones(x_TD.shape[:1], bool) if token_mask_T is None else token_mask_T


def only_valid(ids_TK: jax.Array, valid_T: jax.Array) -> jax.Array:
    """Choices, none for masked tokens."""
    return jnp.where(valid_T[:, None], ids_TK, -1)


def top_k_ids(values_TE: jax.Array, top_k: int) -> jax.Array:
    """The K experts of largest value, the first among equal ones; -1 where fewer than K are above -inf."""
    values_TK, ids_TK = jax.lax.top_k(jax.lax.stop_gradient(values_TE), top_k)
    return keep_decision(jnp.where(values_TK > -jnp.inf, ids_TK, -1))


def pick(values_TE: jax.Array, ids_TK: jax.Array) -> jax.Array:
    """values[t, ids[t, k]], 0 where that is none; by comparison, so that the gradient is no scatter."""
    experts_E = jnp.arange(values_TE.shape[1], dtype=ids_TK.dtype)
    chosen_TKE = ids_TK[:, :, None] == experts_E[None, None, :]
    return jnp.sum(jnp.where(chosen_TKE, values_TE[:, None, :], 0), axis=-1)


def softmax_top_k(
    logits_TE: jax.Array, top_k: int, *, normalize: bool | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The K experts of largest logit: ids_TK, their weights_TK, and the softmax scores_TE over all experts.

    With `normalize` a token's weights sum to one; by default they do where K > 1.
    """
    scores_TE = jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1)
    ids_TK = top_k_ids(logits_TE, top_k)
    return ids_TK, combine_weights(logits_TE, scores_TE, ids_TK, normalize), scores_TE


def combine_weights(
    logits_TE: jax.Array, scores_TE: jax.Array, ids_TK: jax.Array, normalize: bool | None
) -> jax.Array:
    """The scores of the choices, softmax(logits); with `normalize` (None: where K > 1) a token's sum to one.

    A single weight would become the constant 1 and leave the router without a gradient (Switch Transformer,
    section 2.1).
    """
    normalize = ids_TK.shape[1] > 1 if normalize is None else normalize
    return softmax_of_chosen(logits_TE, ids_TK) if normalize else pick(scores_TE, ids_TK)


def softmax_of_chosen(logits_TE: jax.Array, ids_TK: jax.Array) -> jax.Array:
    """Softmax over a token's choices alone, 0 for none: what softmax scores are when they are made to sum to one.

    From the logits, for the scores of choices that are far from the best may have no digits left to divide.
    """
    chosen_TK = ids_TK >= 0
    logits_TK = pick(logits_TE.astype(jnp.float32), ids_TK)
    largest_T1 = jnp.max(logits_TK, axis=1, keepdims=True, initial=-jnp.inf, where=chosen_TK)
    largest_T1 = jax.lax.stop_gradient(jnp.where(jnp.isfinite(largest_T1), largest_T1, 0))
    exp_TK = jnp.where(chosen_TK, jnp.exp(jnp.where(chosen_TK, logits_TK - largest_T1, 0)), 0)
    total_T1 = jnp.sum(exp_TK, axis=1, keepdims=True)
    return exp_TK / jnp.where(total_T1 > 0, total_T1, 1)


def keep_decision(ids_TK: jax.Array) -> jax.Array:
    """Name a routing decision so that every remat policy saves it: computed again, rounding could flip it."""
    return checkpoint_name(ids_TK, ROUTING_DECISION)
