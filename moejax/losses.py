"""Auxiliary losses of the routers, over the global batch, and the language model's cross-entropy.

Every sum over tokens is a sum over the tokens of all devices, so value and gradient do not depend on the layout.

Shapes: T tokens on this device, E experts, K experts per token, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from moejax.routing import Routing


def _global_sum(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    return jax.lax.psum(x, tuple(axes)) if axes else x


def expert_load(ids_TK: jax.Array, num_experts: int, axes: Sequence[str] = ()) -> jax.Array:
    """Choices per expert over all devices, [E] i32; ids outside 0..E-1 count nowhere."""
    chosen_TKE = ids_TK[:, :, None] == jnp.arange(num_experts, dtype=ids_TK.dtype)[None, None, :]
    return _global_sum(jnp.sum(chosen_TKE, axis=(0, 1), dtype=jnp.int32), axes)


def balance_loss(routing: Routing, axes: Sequence[str] = ()) -> jax.Array:
    """E * sum_e f_e P_e (Switch Transformer, eq. 4), f and P taken over the global batch.

    f_e is the share of all choices that went to expert e, P_e the mean score of e over all tokens. 1 when balanced,
    up to E when one expert takes all. Finite, and zero, when no token is valid.
    """
    num_experts = routing.scores_TE.shape[1]
    load_E = expert_load(routing.ids_TK, num_experts, axes).astype(jnp.float32)
    score_E = _global_sum(jnp.sum(jnp.where(routing.valid_T[:, None], routing.scores_TE, 0), axis=0), axes)
    tokens = _global_sum(jnp.sum(routing.valid_T, dtype=jnp.float32), axes)
    return num_experts * jnp.sum(load_E * score_E) / jnp.maximum(jnp.sum(load_E) * tokens, 1)


def z_loss(routing: Routing, axes: Sequence[str] = ()) -> jax.Array:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, eq. 5)."""
    z_T = jnp.where(routing.valid_T, jax.nn.logsumexp(routing.logits_TE, axis=-1), 0)
    tokens = _global_sum(jnp.sum(routing.valid_T, dtype=jnp.float32), axes)
    return _global_sum(jnp.sum(z_T * z_T), axes) / jnp.maximum(tokens, 1)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(x_TD: jax.Array, w_VD: jax.Array, targets_T: jax.Array, chunk: int) -> jax.Array:
    """Sum over tokens of -log softmax(x @ w.T)[target], in nats; targets below 0 count nothing.

    The logits of only `chunk` tokens stand in memory at once: in training, each chunk's gradient is taken while its
    logits are there, which also saves computing them a second time.
    """

    def step(total, part):
        x_CD, targets_C = part
        return total + _nll(x_CD, targets_C, w_VD)[0], None

    start = 0.0 * jnp.sum(x_TD[:0, :1], dtype=jnp.float32)
    return _scan_chunks(step, start, x_TD, targets_T, chunk)[0]


def _nll(x_CD: jax.Array, targets_C: jax.Array, w_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summed loss of one chunk, and the gradient of its logits [C, V] f32."""
    logits_CV = jnp.dot(x_CD, w_VD.T, preferred_element_type=jnp.float32)
    log_sum_C = jax.nn.logsumexp(logits_CV, axis=-1)
    is_target_CV = targets_C[:, None] == jnp.arange(w_VD.shape[0], dtype=targets_C.dtype)[None, :]
    target_logit_C = jnp.sum(jnp.where(is_target_CV, logits_CV, 0), axis=-1)
    counted_C = targets_C >= 0
    loss = jnp.sum(jnp.where(counted_C, log_sum_C - target_logit_C, 0))
    gradient_CV = jnp.exp(logits_CV - log_sum_C[:, None]) - is_target_CV
    return loss, jnp.where(counted_C[:, None], gradient_CV, 0)


def _scan_chunks(step, start, x_TD: jax.Array, targets_T: jax.Array, chunk: int):
    """Fold `step(carry, (x_CD, targets_C))` over the tokens, the last chunk filled up with uncounted ones."""
    num_tokens, d_model = x_TD.shape
    if num_tokens <= chunk:
        return step(start, (x_TD, targets_T))
    padding = -num_tokens % chunk
    x = jnp.pad(x_TD, ((0, padding), (0, 0))).reshape(-1, chunk, d_model)
    targets = jnp.pad(targets_T, (0, padding), constant_values=-1).reshape(-1, chunk)
    return jax.lax.scan(step, start, (x, targets))


def _cross_entropy_forward(x_TD, w_VD, targets_T, chunk):
    def step(carry, part):
        total, dw_VD = carry
        x_CD, targets_C = part
        loss, gradient_CV = _nll(x_CD, targets_C, w_VD)
        gradient_CV = gradient_CV.astype(x_CD.dtype)
        dw_VD = dw_VD + jnp.dot(gradient_CV.T, x_CD, preferred_element_type=jnp.float32)
        return (total + loss, dw_VD), jnp.dot(gradient_CV, w_VD)

    zero = 0.0 * jnp.sum(x_TD[:0, :1], dtype=jnp.float32)  # varies over the same mesh axes as x
    start = (zero, zero + jnp.zeros(w_VD.shape, jnp.float32))
    (total, dw_VD), dx = _scan_chunks(step, start, x_TD, targets_T, chunk)
    dx_TD = dx.reshape(-1, x_TD.shape[1])[: x_TD.shape[0]]
    return total, (dx_TD, dw_VD.astype(w_VD.dtype))


def _cross_entropy_backward(chunk, residuals, d_total):
    dx_TD, dw_VD = residuals
    # In f32: rounded to bf16, the factor would be off by up to 2**-9 for all gradients alike.
    dx_TD, dw_VD = ((d.astype(jnp.float32) * d_total).astype(d.dtype) for d in (dx_TD, dw_VD))
    return dx_TD, dw_VD, None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
