"""The dense oracle: every expert applied to every token, in one line each. Slow, obvious, and sharing no code."""

import jax
import jax.numpy as jnp


def moe(x_TD, w_router_DE, w_in_ED2F, w_out_EFD, *, top_k, normalize=True, activation="swiglu", mask_T=None):
    """y_TD, balance loss and z-loss of one MoE layer with a softmax top-k router."""
    num_experts = w_router_DE.shape[1]
    mask_T = jnp.ones(x_TD.shape[0], bool) if mask_T is None else mask_T
    logits_TE = x_TD @ w_router_DE
    probs_TE = jax.nn.softmax(logits_TE)
    threshold_T = jnp.sort(probs_TE, axis=-1)[:, -top_k]
    chosen_TE = (probs_TE >= threshold_T[:, None]) & mask_T[:, None]
    weights_TE = jnp.where(chosen_TE, probs_TE, 0.0)
    if normalize:
        weights_TE = weights_TE / jnp.where(mask_T, weights_TE.sum(axis=-1), 1.0)[:, None]
    y_TD = sum(
        weights_TE[:, e, None] * ffn(x_TD, w_in_ED2F[e], w_out_EFD[e], activation) for e in range(num_experts)
    )
    count = mask_T.sum()
    f_E = chosen_TE.sum(axis=0) / (count * top_k)
    p_E = jnp.where(mask_T[:, None], probs_TE, 0.0).sum(axis=0) / count
    z_T = jnp.log(jnp.exp(logits_TE).sum(axis=-1))
    return y_TD, num_experts * (f_E * p_E).sum(), jnp.where(mask_T, z_T**2, 0.0).sum() / count


def ffn(x_TD, w_in, w_out_FD, activation="swiglu"):
    hidden = x_TD @ w_in.reshape(w_in.shape[0], -1)
    if activation == "gelu":
        return jax.nn.gelu(hidden) @ w_out_FD
    gate, up = hidden[:, : w_out_FD.shape[0]], hidden[:, w_out_FD.shape[0] :]
    return (gate / (1 + jnp.exp(-gate)) * up) @ w_out_FD
