"""Causal grouped-query attention over packed documents, and its key-value cache.

Shapes: B sequences, S positions, D model width, H query heads, G key/value heads, h width of a head, W window.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
from flax import nnx

from custom_ops.checks import array, instance_of, require, require_shape
from moejax.arguments import checked
from moejax.layers import RMSNorm, init_matrix, rms_norm, rotate, rotation


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The last W keys and values of one layer (of all layers: a leading L on each field).

    Fields:
      k_BWGh, v_BWGh: rotated keys, and values; position p lies in slot p mod W.
      position_W: the position in each slot, -1 where it is empty.
    """

    k_BWGh: jax.Array
    v_BWGh: jax.Array
    position_W: jax.Array

    def check(self, *layers: int, num_tokens: tuple[int, ...], heads: tuple[int, int]) -> None:
        """Refuse fields of other sizes than so many `layers` (none: a single one) of such heads need.

        Args:
          num_tokens: B and S of what is to be appended.
          heads: G and h.

        Raises:
          ValueError: names the field, as one of `cache`.
        """
        (B, S), before = num_tokens, "L, " * len(layers)
        array(f"[{before}W]", jnp.integer)("cache.position_W", self.position_W)
        W = self.position_W.shape[-1]
        require_shape("cache.position_W", self.position_W, (*layers, W), "a window for each layer")
        rule = f"must have slots for {S} positions at once"
        require(S <= W, "cache.position_W", self.position_W, rule)
        for name in ("k_BWGh", "v_BWGh"):
            array(f"[{before}B, W, G, h]", jnp.floating)(f"cache.{name}", getattr(self, name))
            what = "as Transformer.init_cache makes it for these sequences"
            require_shape(f"cache.{name}", getattr(self, name), (*layers, B, W, *heads), what)

    def append(self, k_BSGh: jax.Array, v_BSGh: jax.Array, position_S: jax.Array) -> KVCache:
        """Store S <= W new positions over the oldest ones."""
        slot_S = position_S % self.position_W.shape[0]
        return KVCache(
            self.k_BWGh.at[:, slot_S].set(k_BSGh.astype(self.k_BWGh.dtype)),
            self.v_BWGh.at[:, slot_S].set(v_BSGh.astype(self.v_BWGh.dtype)),
            self.position_W.at[slot_S].set(position_S),
        )


class Attention(nnx.Module):
    """Causal self-attention with rotary positions and normalised queries and keys (Dehghani et al. 2023)."""

    @checked()
    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        rope_theta: float = 10_000.0,
        out_scale: float = 1.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if d_model % num_heads or (d_model // num_heads) % 2:
            raise ValueError(f"d_model = {d_model}: must give each of num_heads ({num_heads}) an even width")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_kv_heads = {num_kv_heads}: must divide num_heads ({num_heads})")
        self.d_head = d_model // num_heads
        self.rope_theta = rope_theta
        self.dtype = dtype

        def projection(heads: int) -> nnx.Param:
            shape = (d_model, heads * self.d_head)
            return init_matrix(rngs, shape, axes=("embed", "heads"), std=d_model**-0.5)

        self.w_q, self.w_k, self.w_v = (
            projection(num_heads),
            projection(num_kv_heads),
            projection(num_kv_heads),
        )
        self.w_out = init_matrix(
            rngs, (num_heads * self.d_head, d_model), axes=("heads", "embed"), std=out_scale * d_model**-0.5
        )
        self.q_norm = RMSNorm(self.d_head, axis="hidden")
        self.k_norm = RMSNorm(self.d_head, axis="hidden")

    @property
    def kv_heads(self) -> tuple[int, int]:
        """G and h: how many key/value heads there are, and their width."""
        return self.w_k.shape[-1] // self.d_head, self.d_head

    @checked()
    def rotation(self, positions_BS: jax.Array) -> jax.Array:
        """[B, S, 2, h / 2]: what queries and keys are rotated by."""
        return rotation(positions_BS, self.d_head, self.rope_theta)

    @checked(cache=instance_of(KVCache, "a KVCache, as Transformer.init_cache returns it"))
    def __call__(
        self,
        x_BSD: jax.Array,
        segments_BS: jax.Array | None,
        positions_BS: jax.Array,
        cache: KVCache | None = None,
        rotation_BS2f: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend within each document, to the past and oneself only.

        Args:
          segments_BS: document of each position; positions of different documents do not see each other. None where
            each sequence is one document: then no [B, 1, S, S] mask is made.
          positions_BS: position within the document. With a cache: the same in every sequence.
          cache: earlier keys and values; then the new ones are stored, and attention goes to the last W.
          rotation_BS2f: `self.rotation(positions_BS)`, where several layers share it.
        """
        d_model = self.w_q.shape[0]
        require(x_BSD.shape[2] == d_model, "x_BSD", x_BSD, f"must be [B, S, {d_model}]")
        for argument, value in (("segments_BS", segments_BS), ("positions_BS", positions_BS)):
            if value is not None:
                require_shape(argument, value, x_BSD.shape[:2], "one for each token of x_BSD")
        if cache is not None:
            cache.check(num_tokens=x_BSD.shape[:2], heads=self.kv_heads)
        if rotation_BS2f is None:
            rotation_BS2f = self.rotation(positions_BS)
        turns = (*x_BSD.shape[:2], 2, self.d_head // 2)
        require_shape("rotation_BS2f", rotation_BS2f, turns, "as rotation(positions_BS) returns it")
        weights = jnp.concatenate([self.w_q[...], self.w_k[...], self.w_v[...]], axis=1).astype(self.dtype)
        num_heads, num_kv = (w.shape[1] // self.d_head for w in (self.w_q, self.w_k))
        heads = (*x_BSD.shape[:2], num_heads + 2 * num_kv, self.d_head)
        qkv = (x_BSD.astype(self.dtype) @ weights).reshape(heads)
        scales = [jnp.broadcast_to(self.q_norm.scale[...], (num_heads, self.d_head))]
        scales += [jnp.broadcast_to(self.k_norm.scale[...], (num_kv, self.d_head))]
        qk, v = jnp.split(qkv, [num_heads + num_kv], axis=2)
        q, k = jnp.split(_norm_and_rotate(qk, jnp.concatenate(scales), rotation_BS2f), [num_heads], axis=2)
        if cache is None:
            mask = None
            if segments_BS is not None:
                mask = segments_BS[:, None, :, None] == segments_BS[:, None, None, :]
            y = _attend(q, k, v, mask, is_causal=True)
        else:
            position_S = positions_BS[0]
            cache = cache.append(k, v, position_S)
            seen, now = cache.position_W[None, :], position_S[:, None]
            mask = (seen >= 0) & (seen <= now)
            k, v = cache.k_BWGh.astype(q.dtype), cache.v_BWGh.astype(q.dtype)
            y = _attend(q, k, v, mask[None, None], is_causal=False)
        return y.reshape(*x_BSD.shape[:2], num_heads * self.d_head) @ self.w_out[...].astype(
            self.dtype
        ), cache


@jax.checkpoint  # backward keeps what comes in, not the many steps within
def _norm_and_rotate(x_BSHh: jax.Array, scale_Hh: jax.Array, rotation_BS2f: jax.Array) -> jax.Array:
    return rotate(rms_norm(x_BSHh, scale_Hh), rotation_BS2f)


def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, *, is_causal: bool
) -> jax.Array:
    if (capability := _compute_capability()) is not None:
        obstacle = flash_obstacle(q, k, has_mask=mask is not None, capability=capability)
        if obstacle is None:
            return jax.nn.dot_product_attention(
                q, k, v, mask=mask, is_causal=is_causal, implementation="cudnn"
            )
        _warn_once(obstacle)

    # Elsewhere the scores are at least not kept for backward, but computed again.
    @jax.checkpoint
    def attend(q, k, v, mask):
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=is_causal, implementation="xla")

    return attend(q, k, v, mask)


def flash_obstacle(q, k, *, has_mask: bool, capability: float) -> str | None:
    """Why cuDNN's flash attention, which never holds the S x S scores, cannot take these arrays; None if it can.

    Args:
      q, k: arrays or shapes, [B, S, heads, h].
      capability: the GPU's compute capability. The limits are those that jax and cuDNN 9 check.
    """
    widest = 256 if capability >= 9.0 else 128
    if capability < 8.0:
        return f"compute capability {capability} is below 8.0"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bf16 and f16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > widest:
        return f"the width of a head must be a multiple of 8 and at most {widest}, it is {q.shape[-1]}"
    if has_mask and (q.shape[1] % 2 or k.shape[1] % 2):
        return f"with packed documents sequences must have an even length, not {q.shape[1]} and {k.shape[1]}"
    return None


def _compute_capability() -> float | None:
    """Of the default device, such as 9.0; None where it is no NVIDIA GPU."""
    if jax.default_backend() != "gpu":
        return None
    try:
        return float(jax.devices()[0].compute_capability)
    except (AttributeError, ValueError):  # AMD's are names
        return None


@cache
def _warn_once(obstacle: str) -> None:
    logging.getLogger("moejax").warning("attention runs without cuDNN's flash kernel: %s", obstacle)
