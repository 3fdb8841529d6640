"""Routers that learn nothing: by hash of the token, at random, all to the same experts.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from moejax.arguments import checked
from moejax.routing.decision import Routing, only_valid, valid_tokens
from moejax.routing.groups import draw
from moejax.routing.router import BadOption, Router


class _Fixed(Router):
    """Weights of 1 / K, logits of zero."""

    default_losses: ClassVar[dict[str, float]] = {}

    def _route(self, ids_TK: jax.Array, valid_T: jax.Array) -> Routing:
        weights_TK = jnp.full(ids_TK.shape, 1 / self.top_k, jnp.float32)
        logits_TE = jnp.zeros((ids_TK.shape[0], self.num_experts), jnp.float32)
        scores_TE = jnp.full_like(logits_TE, 1 / self.num_experts)
        return Routing(only_valid(ids_TK, valid_T), weights_TK, logits_TE, scores_TE, valid_T)


class Hash(_Fixed):
    """The experts of a token are those of its id, whatever the context (Roller et al. 2021, section 3.1: random hash).

    The K largest of E hashes of (id, expert).

    Args:
      hash_seed: of the hash.
    """

    @checked()
    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        hash_seed: int = 0,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(num_experts, top_k)
        self.hash_seed = hash_seed

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`; needs `token_ids_T`."""
        if token_ids_T is None:
            raise ValueError("token_ids_T = None: the hash router must be given the ids of the tokens")
        experts_E = jnp.arange(self.num_experts, dtype=jnp.uint32)
        pair_TE = token_ids_T.astype(jnp.uint32)[:, None] * jnp.uint32(self.num_experts) + experts_E[None, :]
        hash_TE = mix_bits(pair_TE ^ mix_bits(jnp.uint32(self.hash_seed)))
        return self._route(
            jax.lax.top_k(hash_TE, self.top_k)[1], valid_tokens(x_TD, token_mask_T, token_ids_T)
        )


class Random(_Fixed):
    """K different experts, drawn evenly by the token's place in the batch; without a key always the same ones."""

    @checked()
    def __init__(
        self, d_model: int, num_experts: int, *, top_k: int | None = None, rngs: nnx.Rngs | None = None
    ):
        super().__init__(num_experts, top_k)

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`."""
        key = jax.random.key(0) if key is None else key
        bits_TE = draw(jax.random.bits, key, x_TD.shape[0], (self.num_experts,))
        return self._route(
            jax.lax.top_k(bits_TE, self.top_k)[1], valid_tokens(x_TD, token_mask_T, token_ids_T)
        )


class One(_Fixed):
    """Everything to one expert (to K of them): the worst case, for tests and measurements.

    Args:
      expert: the first of them; the others follow it.
    """

    default_top_k: ClassVar[int] = 1

    @checked()
    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        expert: int = 0,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(num_experts, top_k)
        if expert >= num_experts:
            raise BadOption("expert", expert, f"must be between 0 and {num_experts - 1}")
        self.expert = expert

    @checked()
    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None) -> Routing:
        """As `Router`."""
        ids_K = (self.expert + jnp.arange(self.top_k, dtype=jnp.int32)) % self.num_experts
        ids_TK = jnp.broadcast_to(ids_K[None, :], (x_TD.shape[0], self.top_k))
        return self._route(ids_TK, valid_tokens(x_TD, token_mask_T, token_ids_T))


def mix_bits(x: jax.Array) -> jax.Array:
    """Finalizer of MurmurHash3, u32 -> u32: every bit of the input changes half of the output's."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> jnp.uint32(16))
