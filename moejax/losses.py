"""Auxiliary losses of the routers, and the language model's cross-entropy.

Sums over tokens are sums over the tokens of all devices, so value and gradient do not depend on the layout.

Shapes: T tokens on this device, B sequences of S tokens, E experts, K experts per token, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from custom_ops.checks import is_array, require
from moejax.routing import Routing


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchLoad:
    """What a layer that sees one part of a batch must know of the whole to have the whole's gradient.

    With it, the mean over the parts of a loss is the loss of the whole batch.

    Fields:
      counted_E: choices per expert that the balance loss counts, f32; see `count_choices`.
      tokens: valid tokens, f32.
      parts: how many parts there are, f32.
    """

    counted_E: jax.Array
    tokens: jax.Array
    parts: jax.Array

    def check(self, num_experts: int, *layers: int) -> None:
        """Refuse fields of other sizes than a layer of so many experts has, or several of them: `layers`.

        Raises:
          ValueError: names the field, as one of `batch_load`.
        """
        shapes = {"counted_E": (*layers, num_experts), "tokens": layers, "parts": layers}
        for name, shape in shapes.items():
            value = getattr(self, name)
            is_number = isinstance(value, (int, float, np.generic)) or is_array(value)
            fits = (
                is_number and np.shape(value) == shape and jnp.issubdtype(jnp.result_type(value), np.number)
            )
            require(fits, f"batch_load.{name}", value, f"must be numbers {list(shape)}")


def _global_sum(x: jax.Array, axes: Sequence[str]) -> jax.Array:
    return jax.lax.psum(x, tuple(axes)) if axes else x


def expert_load(ids_TK: jax.Array, num_experts: int, axes: Sequence[str] = ()) -> jax.Array:
    """Choices per expert over all devices, [E] i32; ids outside 0..E-1 count nowhere."""
    chosen_TKE = ids_TK[:, :, None] == jnp.arange(num_experts, dtype=ids_TK.dtype)[None, None, :]
    return _global_sum(jnp.sum(chosen_TKE, axis=(0, 1), dtype=jnp.int32), axes)


def count_choices(routing: Routing, axes: Sequence[str] = ()) -> jax.Array:
    """Choices per expert that the balance loss counts, [E] f32: those before a capacity took any away."""
    ids_TK = routing.ids_TK if routing.counted_TK is None else routing.counted_TK
    return expert_load(ids_TK, routing.scores_TE.shape[1], axes).astype(jnp.float32)


def count_tokens(routing: Routing, axes: Sequence[str] = ()) -> jax.Array:
    """Valid tokens, f32."""
    return _global_sum(jnp.sum(routing.valid_T, dtype=jnp.float32), axes)


def balance_loss(routing: Routing, axes: Sequence[str] = (), *, batch: BatchLoad | None = None) -> jax.Array:
    """E * sum_e f_e P_e (Switch Transformer, eq. 4; GShard's loss times E^2), f and P taken over the global batch.

    f_e is the share of all choices that went to expert e, P_e the mean score of e over all tokens. 1 when balanced,
    up to E when one expert takes all. Finite, and zero, when no token is valid.

    Args:
      batch: f of the larger batch that this is a part of. The loss is linear in P, so the parts' gradients add up to
        that of the whole batch. None: this is the batch.
    """
    score_E = _global_sum(jnp.sum(jnp.where(routing.valid_T[:, None], routing.scores_TE, 0), axis=0), axes)
    if batch is None:
        batch = BatchLoad(count_choices(routing, axes), count_tokens(routing, axes), jnp.float32(1))
    scale = score_E.shape[0] * batch.parts / jnp.maximum(jnp.sum(batch.counted_E) * batch.tokens, 1)
    return scale * jnp.sum(batch.counted_E * score_E)


def sequence_balance_loss(routing: Routing, axes: Sequence[str] = (), *, sequence_length: int) -> jax.Array:
    """`balance_loss` of each sequence by itself, mean over those that have a valid token (DeepSeek-V3, eq. 17-20).

    Args:
      sequence_length: S; this device's tokens are whole sequences.
    """
    num_experts = routing.scores_TE.shape[1]
    ids_TK = routing.ids_TK if routing.counted_TK is None else routing.counted_TK
    by_sequence = lambda a: a.reshape(-1, sequence_length, *a.shape[1:])  # noqa: E731
    load_BE = jax.vmap(lambda ids_SK: expert_load(ids_SK, num_experts))(by_sequence(ids_TK)).astype(
        jnp.float32
    )
    scores_BSE = by_sequence(jnp.where(routing.valid_T[:, None], routing.scores_TE, 0))
    tokens_B = jnp.sum(by_sequence(routing.valid_T), axis=1, dtype=jnp.float32)
    product_B = num_experts * jnp.sum(load_BE * jnp.sum(scores_BSE, axis=1), axis=1)
    loss_B = product_B / jnp.maximum(jnp.sum(load_BE, axis=1) * tokens_B, 1)
    sequences = _global_sum(jnp.sum(tokens_B > 0, dtype=jnp.float32), axes)
    return _global_sum(jnp.sum(loss_B), axes) / jnp.maximum(sequences, 1)


def importance_loss(routing: Routing, axes: Sequence[str] = ()) -> jax.Array:
    """Squared coefficient of variation of the experts' summed weights (Shazeer et al. 2017, eq. 6-7).

    With the variance of the population; FastMoE's is that of a sample, E / (E - 1) times as large.
    """
    experts_E = jnp.arange(routing.scores_TE.shape[1], dtype=routing.ids_TK.dtype)
    chosen_TKE = routing.ids_TK[:, :, None] == experts_E[None, None, :]
    importance_E = jnp.sum(jnp.where(chosen_TKE, routing.weights_TK[:, :, None], 0), axis=(0, 1))
    return squared_variation(_global_sum(importance_E, axes))


def load_loss(routing: Routing, axes: Sequence[str] = ()) -> jax.Array:
    """Squared coefficient of variation of the experts' expected load (Shazeer et al. 2017, eq. 10-11).

    With the variance of the population, as `importance_loss`. Zero where the router knows no chances (without noise).
    """
    if routing.chance_TE is None:
        return jnp.float32(0)
    load_E = jnp.sum(jnp.where(routing.valid_T[:, None], routing.chance_TE, 0), axis=0)
    return squared_variation(_global_sum(load_E, axes))


def squared_variation(x_E: jax.Array) -> jax.Array:
    """Variance over squared mean, of the population; 0 with a gradient of 0 where x is."""
    mean = jnp.mean(x_E)
    return jnp.mean((x_E - mean) ** 2) / jnp.where(mean == 0, 1, mean * mean)


def z_loss(routing: Routing, axes: Sequence[str] = (), *, batch: BatchLoad | None = None) -> jax.Array:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, eq. 5); `batch` as for `balance_loss`."""
    z_T = jnp.where(routing.valid_T, jax.nn.logsumexp(routing.logits_TE, axis=-1), 0)
    tokens, parts = (count_tokens(routing, axes), 1) if batch is None else (batch.tokens, batch.parts)
    return parts * _global_sum(jnp.sum(z_T * z_T), axes) / jnp.maximum(tokens, 1)


def orthogonality_loss(w_DE: jax.Array) -> jax.Array:
    """Mean of |w^T w - 1| over pairs of experts, of the router's matrix alone (Omi et al. 2025, who take the sum).

    0 when the experts' columns are orthonormal; the same on all devices, whatever the tokens.
    """
    w_DE = w_DE.astype(jnp.float32)
    return jnp.mean(jnp.abs(w_DE.T @ w_DE - jnp.eye(w_DE.shape[1], dtype=jnp.float32)))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(x_TD: jax.Array, w_VD: jax.Array, targets_T: jax.Array, chunk: int) -> jax.Array:
    """Sum over tokens of -log softmax(x @ w.T)[target], in nats; targets below 0 count nothing.

    The logits of only `chunk` tokens are in memory at once: in training, each chunk's gradient is taken while its
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
