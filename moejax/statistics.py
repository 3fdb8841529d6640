"""What a router did with a batch, computed where the batch is: no field needs the host.

Shapes: T tokens on this device, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from moejax.losses import count_choices, count_tokens
from moejax.routing import Routing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RouterStats:
    """Over the global batch; every field the same on all devices and without gradient.

    Fields:
      counted_E: choices per expert that the balance loss counts, f32.
      tokens: valid tokens, f32.
      dropped: choices that the router took away (capacity, budget), i32.
      entropy: of a token's scores over the experts, mean, in nats; log(E) when it does not care, 0 when it is sure.
      logit_norm: root mean square of the logits.
      z: mean of logsumexp(logits).
    """

    counted_E: jax.Array
    tokens: jax.Array
    dropped: jax.Array
    entropy: jax.Array
    logit_norm: jax.Array
    z: jax.Array


def router_stats(routing: Routing, axes: Sequence[str] = ()) -> RouterStats:
    """The statistics of one routing; `axes` are the mesh axes over which tokens are split."""
    routing = jax.lax.stop_gradient(routing)
    sum_all = lambda x: jax.lax.psum(x, tuple(axes)) if axes else x  # noqa: E731
    valid_T, logits_TE = routing.valid_T, routing.logits_TE
    finite_TE = jnp.where(jnp.isfinite(logits_TE), logits_TE, 0)
    per_token_3T = jnp.stack(
        [
            jnp.sum(jax.scipy.special.entr(routing.scores_TE), axis=1),
            jnp.mean(finite_TE * finite_TE, axis=1),
            jax.nn.logsumexp(logits_TE, axis=1),
        ]
    )
    tokens = count_tokens(routing, axes)
    sums_3 = sum_all(jnp.sum(jnp.where(valid_T[None, :], per_token_3T, 0), axis=1))
    entropy, square, z = sums_3 / jnp.maximum(tokens, 1)
    dropped = jnp.int32(0) if routing.dropped_T is None else sum_all(jnp.sum(routing.dropped_T))
    return RouterStats(count_choices(routing, axes), tokens, dropped, entropy, jnp.sqrt(square), z)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choices:
    """What a layer tells of single choices when it is asked to; for evaluations.

    Fields:
      together_EE: tokens that chose both experts, over all devices, f32 (exact below 2**24); on the diagonal, those
        that chose the one.
      first_T: each token's first choice, i32, -1 for none; of this device's tokens.
    """

    together_EE: jax.Array
    first_T: jax.Array


def chosen_together(ids_TK: jax.Array, num_experts: int, axes: Sequence[str] = ()) -> jax.Array:
    """`Choices.together_EE` of ids 0..E-1 (-1: none); `axes` are the mesh axes over which tokens are split."""
    experts_E = jnp.arange(num_experts, dtype=ids_TK.dtype)
    chosen_TE = jnp.any(ids_TK[:, :, None] == experts_E[None, None, :], axis=1).astype(jnp.float32)
    together_EE = chosen_TE.T @ chosen_TE
    return jax.lax.psum(together_EE, tuple(axes)) if axes else together_EE


def max_violation(load_E: jax.Array, num_experts: Any = None) -> jax.Array:
    """(largest load - mean load) / mean load over the last dimension (Wang et al. 2024, eq. 4); 0 without load.

    Args:
      num_experts: how many of the entries are experts, an integer for each row or one for all; None: all of them.
    """
    mean = jnp.sum(load_E, axis=-1) / _count(load_E, num_experts)
    return jnp.where(mean > 0, jnp.max(load_E, axis=-1) / jnp.where(mean > 0, mean, 1) - 1, 0)


def load_entropy(load_E: jax.Array, num_experts: Any = None) -> jax.Array:
    """Entropy of the experts' shares over log(E), last dimension: 1 when balanced, 0 when one takes all.

    Args:
      num_experts: as for `max_violation`.
    """
    total = jnp.sum(load_E, axis=-1, keepdims=True)
    share_E = load_E / jnp.maximum(total, 1)
    largest = jnp.log(jnp.maximum(_count(load_E, num_experts), 2))
    return jnp.sum(jax.scipy.special.entr(share_E), axis=-1) / largest


def _count(load_E: jax.Array, num_experts: Any) -> jax.Array:
    return jnp.asarray(load_E.shape[-1] if num_experts is None else num_experts, jnp.float32)
