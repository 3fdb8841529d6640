"""The dense oracle: every expert applied to every token, in one line each. Slow, obvious, and sharing no code."""

import math

import jax
import jax.numpy as jnp

# Each activation by its formula; with two arguments for gated ones.
PLAIN = {
    "gelu": lambda a: a / 2 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))),
    "gelu_exact": lambda a: a / 2 * (1 + jax.scipy.special.erf(a / math.sqrt(2))),
    "relu": lambda a: jnp.where(a > 0, a, 0),
    "relu2": lambda a: jnp.where(a > 0, a, 0) ** 2,
}
GATED = {
    "swiglu": lambda gate, up: gate / (1 + jnp.exp(-gate)) * up,
    "geglu": lambda gate, up: PLAIN["gelu"](gate) * up,
    "reglu": lambda gate, up: PLAIN["relu"](gate) * up,
    "clamped_swiglu": lambda gate, up: _gpt_oss(jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)),
}


def _gpt_oss(gate, up):
    return (up + 1) * gate / (1 + jnp.exp(-1.702 * gate))


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


def ffn(x_TD, w_in, w_out_FD, activation="swiglu", b_in=None, b_out_D=None):
    """One FFN: w_in [D, parts, F] or [D, parts * F], biases of the shapes that these have without D, and [D]."""
    hidden = x_TD @ w_in.reshape(w_in.shape[0], -1)
    if b_in is not None:
        hidden = hidden + b_in.reshape(1, -1)
    a = PLAIN[activation](hidden) if activation in PLAIN else GATED[activation](*jnp.split(hidden, 2, axis=1))
    y_TD = a @ w_out_FD
    return y_TD if b_out_D is None else y_TD + b_out_D[None, :]


def within_capacity(ids_TK, num_experts, factor):
    """The first ceil(factor * T * K / E) choices of every expert in the order of tokens; -1 for the others."""
    is_choice_NE = jnp.reshape(ids_TK, (-1, 1)) == jnp.arange(num_experts)[None, :]
    place_N = jnp.sum(jnp.cumsum(is_choice_NE, axis=0) * is_choice_NE, axis=1)
    fits_N = place_N <= math.ceil(factor * ids_TK.size / num_experts)
    return jnp.where(fits_N.reshape(ids_TK.shape), ids_TK, -1)


def layer(moe, routing, x_TD, ids_TK):
    """y_TD of an `MoE` by these choices: of its experts by name, with or without biases, and its shared ones.

    Args:
      routing: of the layer's router, for the weights.
      ids_TK: its choices, less those that are dropped.
    """
    experts, shared = moe.experts, moe.shared
    parameters = [
        p if p is None else p[...] for p in (experts.w_in, experts.w_out, experts.b_in, experts.b_out)
    ]

    def weighted(e, w_in, w_out_FD, b_in, b_out_D):
        weight_T = jnp.where(ids_TK == e, routing.weights_TK, 0).sum(axis=1)
        return weight_T[:, None] * ffn(x_TD, w_in, w_out_FD, experts.activation, b_in, b_out_D)

    y_TD = jax.vmap(weighted)(jnp.arange(moe.num_experts), *parameters).sum(axis=0)
    if shared is not None:
        gate_T1 = 1.0 if shared.w_gate_D1 is None else 1 / (1 + jnp.exp(-x_TD @ shared.w_gate_D1[...]))
        y_TD += gate_T1 * ffn(x_TD, shared.w_in[...], shared.w_out[...], shared.activation)
    return jnp.where(routing.valid_T[:, None], y_TD, 0)


def aux_loss(moe, routing, *, batch_load=None, sequence=None):
    """The weighted sum of all losses of an `MoE`, each by its formula.

    Args:
      sequence: length of a sequence, where each is to be balanced by itself.
    """
    valid_T, ids_TK, num_experts = routing.valid_T, routing.ids_TK, moe.num_experts
    chosen_TKE = ids_TK[:, :, None] == jnp.arange(num_experts)[None, None, :]
    scores_TE = jnp.where(valid_T[:, None], routing.scores_TE, 0)
    load_TE, tokens, parts = chosen_TKE.sum(axis=1), valid_T.sum(), 1
    if sequence is None:
        load_E = load_TE.sum(axis=0)
        if batch_load is not None:
            load_E, tokens, parts = batch_load.counted_E, batch_load.tokens, batch_load.parts
        balance = parts * num_experts * (load_E / load_E.sum() * scores_TE.sum(axis=0) / tokens).sum()
    else:
        each = [slice(begin, begin + sequence) for begin in range(0, len(ids_TK), sequence)]
        balance = jnp.mean(
            jnp.stack(
                [
                    num_experts
                    * (load_TE[s].sum(0) / load_TE[s].sum() * scores_TE[s].sum(0) / valid_T[s].sum()).sum()
                    for s in each
                ]
            )
        )
    z_T = jnp.where(valid_T, jnp.log(jnp.exp(routing.logits_TE).sum(axis=1)), 0) ** 2
    importance_E = jnp.where(chosen_TKE, routing.weights_TK[:, :, None], 0).sum(axis=(0, 1))
    total = moe.balance_weight * balance + moe.z_weight * parts * z_T.sum() / tokens
    total += moe.importance_weight * importance_E.var() / importance_E.mean() ** 2
    if moe.load_weight:
        chance_E = jnp.where(valid_T[:, None], routing.chance_TE, 0).sum(axis=0)
        total += moe.load_weight * chance_E.var() / chance_E.mean() ** 2
    if moe.orthogonality_weight:
        w_DE = moe.router.w_DE[...]
        total += moe.orthogonality_weight * jnp.abs(w_DE.T @ w_DE - jnp.eye(num_experts)).mean()
    return total
