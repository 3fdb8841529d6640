"""GShard: two experts per token, the second one by chance, and a capacity.

Shapes: T tokens, D model width, E experts, K = 2 experts per token.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.arguments import checked
from moejax.routing.capacity import Capacity
from moejax.routing.decision import Routing, only_valid, softmax_top_k, valid_tokens
from moejax.routing.groups import draw
from moejax.routing.router import LinearRouter


class GShard(LinearRouter):
    """Top-2, weights g1 and g2 summing to one (Lepikhin et al. 2020, algorithm 1).

    Its balance loss counts first choices only, before the capacity, over all experts. In training the second expert is
    taken with probability 2 * g2; in evaluation always.

    Args:
      random_second: False takes the second expert always.
      capacity_factor, eval_capacity_factor, drop_by, groups: see `Capacity`.
      router_bias: add a learned bias to the logits.
    """

    only_top_k: ClassVar[int | None] = 2

    @checked()
    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        random_second: bool = True,
        capacity_factor: float = 1.25,
        eval_capacity_factor: float = 2.0,
        drop_by: str = "position",
        groups: int = 1,
        router_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(d_model, num_experts, top_k, router_bias, rngs)
        self.random_second = random_second
        self.capacity = Capacity(capacity_factor, eval_capacity_factor, drop_by, groups)

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`."""
        logits_TE = self.logits(x_TD)
        valid_T = valid_tokens(x_TD, token_mask_T, token_ids_T)
        wanted_TK, weights_TK, scores_TE = softmax_top_k(logits_TE, 2)
        wanted_TK = only_valid(wanted_TK, valid_T)
        first_TK = jnp.stack([wanted_TK[:, 0], jnp.full_like(wanted_TK[:, 0], -1)], axis=1)
        capacity_key = None
        if key is not None:
            second_key, capacity_key = jax.random.split(key)
            if self.random_second:
                uniform_T = draw(jax.random.uniform, second_key, x_TD.shape[0], ())
                takes_second_T = uniform_T < 2 * jax.lax.stop_gradient(weights_TK[:, 1])
                wanted_TK = jnp.where(takes_second_T[:, None], wanted_TK, first_TK)
        ids_TK, dropped_T = self.capacity(wanted_TK, weights_TK, self.num_experts, capacity_key)
        return Routing(ids_TK, weights_TK, logits_TE, scores_TE, valid_T, first_TK, dropped_T)
