"""Switch: one expert per token, jitter and a capacity.

Shapes: T tokens, D model width, E experts.
"""

from __future__ import annotations

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.arguments import checked
from moejax.routing.capacity import Capacity
from moejax.routing.decision import Routing, only_valid, softmax_top_k, valid_tokens
from moejax.routing.groups import draw
from moejax.routing.router import LinearRouter


class Switch(LinearRouter):
    """Top-1, weighted by its probability (Fedus et al. 2021, section 2).

    Args:
      jitter: in training the router sees x * uniform(1 - jitter, 1 + jitter).
      capacity_factor, eval_capacity_factor, drop_by, groups: see `Capacity`.
      router_bias: add a learned bias to the logits.
    """

    default_top_k: ClassVar[int] = 1
    only_top_k: ClassVar[int | None] = 1

    @checked()
    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        jitter: float = 0.01,
        capacity_factor: float = 1.25,
        eval_capacity_factor: float = 2.0,
        drop_by: str = "position",
        groups: int = 1,
        router_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, num_experts, top_k, router_bias, rngs)
        self.jitter = jitter
        self.capacity = Capacity(capacity_factor, eval_capacity_factor, drop_by, groups)

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`."""
        valid_T = valid_tokens(x_TD, token_mask_T, token_ids_T)
        capacity_key = None
        if key is not None:
            jitter_key, capacity_key = jax.random.split(key)
            noise_TD = draw(_symmetric, jitter_key, x_TD.shape[0], x_TD.shape[1:])
            x_TD = x_TD.astype(jnp.float32) * (1 + self.jitter * noise_TD)
        logits_TE = self.logits(x_TD)
        wanted_TK, weights_TK, scores_TE = softmax_top_k(logits_TE, 1)
        wanted_TK = only_valid(wanted_TK, valid_T)
        ids_TK, dropped_T = self.capacity(wanted_TK, weights_TK, self.num_experts, capacity_key)
        return Routing(ids_TK, weights_TK, logits_TE, scores_TE, valid_T, wanted_TK, dropped_T)


def _symmetric(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform in (-1, 1), f32 of 2**16 values: one random word is drawn for two of them, which halves the cost."""
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 2),), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16).reshape(-1)[:size].reshape(shape)
    return (halves.astype(jnp.float32) + 0.5) / 2**15 - 1
