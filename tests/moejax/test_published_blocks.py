"""MoE blocks of published models, written out in f64 as their papers and code have them; values and every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import moejax
from tests import tolerance
from tests.moejax import oracle
from tests.moejax.every_argument import assert_same

B, S, D, F, E = 2, 8, 8, 6, 8
BALANCE = 0.3
NO_LOSS = dict(balance_weight=0.0, z_weight=0.0)

# The layer's arguments by which each is built.
BLOCKS = {
    "DeepSeek-V2": dict(
        top_k=3,
        normalize=False,
        scale=16.0,
        expert_groups=4,
        limit_groups=2,
        shared_experts=2,
        balance_weight=BALANCE,
        z_weight=0.0,
        balance_over="sequence",
    ),
    "DeepSeek-V3": dict(
        router="sigmoid",
        top_k=3,
        scale=2.5,
        expert_groups=4,
        limit_groups=2,
        shared_experts=1,
        balance_weight=BALANCE,
        balance_over="sequence",
    ),
    "GLM-4-MoE": dict(router="sigmoid", top_k=3, scale=1.5, shared_experts=1),
    "Qwen2-MoE": dict(
        top_k=2, normalize=False, shared_experts=1, shared_hidden=10, shared_gate=True, **NO_LOSS
    ),
    "GPT-OSS": dict(top_k=2, router_bias=True, experts="clamped_swiglu", expert_bias=True, **NO_LOSS),
}


def is_largest(rows, k):
    """Of each row the k largest: bool, the first among equals."""
    return jnp.argsort(jnp.argsort(-rows, axis=1, stable=True), axis=1) < k


def within_groups(choose_by, k, groups, limit, best):
    """DeepSeek's group-limited choice: a group's score is the sum of its `best` largest."""
    choose_by = jax.lax.stop_gradient(choose_by)
    parts = choose_by.reshape(len(choose_by), groups, -1)
    is_open = is_largest(jnp.sort(parts, axis=2)[:, :, -best:].sum(axis=2), limit)
    return is_largest(jnp.where(jnp.repeat(is_open, parts.shape[2], axis=1), choose_by, -jnp.inf), k)


def sequence_balance(scores, chosen, k):
    """DeepSeek-V3, eq. 17-20: sum of f_i P_i of each sequence, with f_i = E / (K S) times the choices of i."""
    total = 0.0
    for b in range(B):
        s = slice(b * S, (b + 1) * S)
        total += (E / (k * S) * chosen[s].sum(axis=0) * scores[s].mean(axis=0)).sum()
    return total / B


def deepseek_v2(p, x):
    """`DeepseekV2MoE` with `group_limited_greedy`, norm_topk_prob False, routed_scaling_factor 16."""
    scores = jax.nn.softmax(x @ p["router"]["w_DE"])
    chosen = within_groups(scores, 3, 4, 2, best=1)
    return jnp.where(chosen, scores, 0) * 16.0, BALANCE * sequence_balance(scores, chosen, 3)


def deepseek_v3(p, x):
    """`DeepseekV3MoE`: the bias chooses, the sigmoids weigh, normalised and times 2.5."""
    s = 1 / (1 + jnp.exp(-x @ p["router"]["w_DE"]))
    chosen = within_groups(s + p["bias"], 3, 4, 2, best=2)
    weights = jnp.where(chosen, s, 0)
    balance = sequence_balance(s / s.sum(axis=1, keepdims=True), chosen, 3)
    return 2.5 * weights / weights.sum(axis=1, keepdims=True), BALANCE * balance


def glm_4_moe(p, x):
    """`Glm4MoeMoE`: as DeepSeek-V3's, one group."""
    s = 1 / (1 + jnp.exp(-x @ p["router"]["w_DE"]))
    weights = jnp.where(within_groups(s + p["bias"], 3, 1, 1, best=2), s, 0)
    return 1.5 * weights / weights.sum(axis=1, keepdims=True), 0.0


def qwen2_moe(p, x):
    """`Qwen2MoeSparseMoeBlock`, norm_topk_prob False."""
    probabilities = jax.nn.softmax(x @ p["router"]["w_DE"])
    return jnp.where(within_groups(probabilities, 2, 1, 1, best=1), probabilities, 0), 0.0


def gpt_oss(p, x):
    """`GptOssTopKRouter`: softmax over the chosen logits, which have a bias."""
    logits = x @ p["router"]["w_DE"] + p["router"]["b_E"]
    chosen = within_groups(logits, 2, 1, 1, best=1)
    return jax.nn.softmax(jnp.where(chosen, logits, -jnp.inf)), 0.0


RESTATED = dict(zip(BLOCKS, (deepseek_v2, deepseek_v3, glm_4_moe, qwen2_moe, gpt_oss), strict=True))


def block(name, p, x):
    """y and the balance loss of one block, of its parameters by name."""
    weights_TE, aux = RESTATED[name](p, x)
    activation, experts, shared = BLOCKS[name].get("experts", "swiglu"), p["experts"], p.get("shared")
    parameters = [experts.get(name) for name in ("w_in", "w_out", "b_in", "b_out")]
    result_ETD = jax.vmap(lambda *p: oracle.ffn(x, p[0], p[1], activation, *p[2:]))(*parameters)
    y = jnp.einsum("te,etd->td", weights_TE, result_ETD)
    if shared is not None:
        of_shared = oracle.ffn(x, shared["w_in"], shared["w_out"])
        gate = 1 / (1 + jnp.exp(-x @ shared["w_gate_D1"])) if "w_gate_D1" in shared else 1.0
        y += gate * of_shared
    return y, aux


def test_blocks_of_published_models():
    layers = {name: moejax.MoE(D, F, E, **options, rngs=nnx.Rngs(0)) for name, options in BLOCKS.items()}
    draw = lambda number, shape: 0.2 * jax.random.normal(jax.random.key(number), shape)  # noqa: E731
    for name in ("DeepSeek-V3", "GLM-4-MoE"):
        layers[name].router.selection_bias_E[...] = draw(1, E)
    gpt = layers["GPT-OSS"]
    for number, bias in enumerate((gpt.router.b_E, gpt.experts.b_in, gpt.experts.b_out)):
        bias[...] = draw(number, bias.shape)
    x, dy = jax.random.normal(jax.random.key(7), (2, B, S, D))
    split = {name: nnx.split(layer, nnx.Param, ...) for name, layer in layers.items()}

    def ours(params, x):
        ys, total = {}, 0.0
        for name, (graphdef, _, others) in split.items():
            ys[name], stats = nnx.merge(graphdef, params[name], others)(x)
            total += jnp.sum(ys[name] * dy) + stats.aux_loss
        return total, ys

    params = {name: parts[1] for name, parts in split.items()}
    (total, ys), (grads, dx) = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(params, x)
    pure = lambda tree: {name: nnx.to_pure_dict(state) for name, state in tree.items()}  # noqa: E731
    actual = {"total": total, "y": ys, "parameters": pure(grads), "x": dx}

    def restated(params, x):
        ys, total = {}, 0.0
        for name in BLOCKS:
            p = params[name]
            if BLOCKS[name].get("router") == "sigmoid":
                p = p | {
                    "bias": jnp.asarray(np.asarray(layers[name].router.selection_bias_E[...], np.float64))
                }
            y, aux = block(name, p, x.reshape(-1, D))
            ys[name] = y.reshape(x.shape)
            total += jnp.sum(ys[name] * dy_f64) + aux
        return total, ys

    wide = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)  # noqa: E731
    arguments = wide((pure(params), x, dy))
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        *arguments, dy_f64 = jax.tree.map(jnp.asarray, arguments)
        run = jax.jit(jax.value_and_grad(restated, argnums=(0, 1), has_aux=True))
        (total, ys), (grads, dx) = run(*arguments)
    expected = wide({"total": total, "y": ys, "parameters": grads, "x": dx})
    assert_same(actual, expected, tolerance.F32)
