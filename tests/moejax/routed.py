"""Every router's decision, loss and gradients beside what its NumPy restatement says.

The tests replace the matrix of the routers' linear layer by the identity, so that x is the logits but for a bias;
D = E.
"""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from moejax.losses import balance_loss, importance_loss, load_loss, z_loss
from moejax.mesh import over_tokens, token_axes, token_sharding
from moejax.routing import ROUTERS, make_router
from tests import tolerance
from tests.moejax import naive_routing as naive

T, E, K = 64, 8, 2
KEY = jax.random.key(5)
TOKEN_IDS = np.random.default_rng(7).integers(0, 50_000, T).astype(np.int32)

# name of the case -> (router, options); options hold for T = 64 and any E that 4 divides.
CASES = {
    "topk": ("topk", {}),
    "topk, not normalised": ("topk", {"normalize": False, "router_bias": True}),
    "topk in groups": ("topk", {"expert_groups": 4, "limit_groups": 2, "scale": 2.5}),
    "noisy": ("noisy", {}),
    "noisy, not normalised": ("noisy", {"normalize": False, "router_bias": True}),
    "gshard": ("gshard", {"groups": 2, "capacity_factor": 0.7, "eval_capacity_factor": 0.9}),
    "gshard by score": (
        "gshard",
        {
            "groups": 8,
            "capacity_factor": 0.7,
            "drop_by": "score",
            "random_second": False,
            "router_bias": True,
        },
    ),
    "switch": (
        "switch",
        {
            "groups": 4,
            "capacity_factor": 0.8,
            "jitter": 0.2,
            "eval_capacity_factor": 0.9,
            "router_bias": True,
        },
    ),
    "switch at random": ("switch", {"capacity_factor": 0.8, "drop_by": "random"}),
    "sigmoid": ("sigmoid", {"normalize": False, "bias_rate": 0.01, "router_bias": True}),
    "sigmoid in groups": ("sigmoid", {"expert_groups": 4, "limit_groups": 2, "scale": 2.5}),
    "expert_choice": (
        "expert_choice",
        {
            "groups": 2,
            "max_experts": 3,
            "capacity_factor": 0.9,
            "eval_capacity_factor": 1.5,
            "router_bias": True,
        },
    ),
    "sinkhorn": ("sinkhorn", {"groups": 2, "iterations": 5, "normalize": False, "router_bias": True}),
    "hash": ("hash", {"hash_seed": 3}),
    "random": ("random", {}),
    "one": ("one", {"expert": 3}),
    "swipe": (
        "swipe",
        {"groups": 2, "devices": 4, "budget_factor": 1.1, "normalize": False, "router_bias": True},
    ),
    "topology": (
        "topology",
        {"groups": 4, "nodes": 2, "off_node_share": 0.2, "normalize": False, "router_bias": True},
    ),
    "rounded up": ("rounded", {"groups": 2, "tile": 4, "rounding": "up"}),
    "rounded down": (
        "rounded",
        {"tile": 4, "rounding": "down", "max_experts": 3, "normalize": False, "router_bias": True},
    ),
    "rounded": ("rounded", {"tile": 4}),
}

# Its logits are not x, so it has a test of its own for what it computes.
COSINE = {"cosine": ("cosine", {"projection": 5, "normalize": False})}


def top_k_of(case, k):
    return ROUTERS[(CASES | COSINE)[case][0]].only_top_k or k


def build(case, num_experts=E, k=K):
    name, options = (CASES | COSINE)[case]
    router = make_router(name, num_experts, num_experts, top_k=top_k_of(case, k), rngs=nnx.Rngs(0), **options)
    random = np.random.default_rng(1)
    if name == "noisy":
        router.w_noise_DE[...] = jnp.asarray(random.normal(size=(num_experts, num_experts)), jnp.float32)
    if name == "sigmoid":
        router.selection_bias_E[...] = jnp.asarray(random.normal(size=num_experts) * 0.1, jnp.float32)
    if getattr(router, "b_E", None) is not None:
        router.b_E[...] = jnp.asarray(random.normal(size=num_experts) * 0.3, jnp.float32)
    return router


def without_matrix(router, x_TD):
    """In place of `LinearRouter.logits`."""
    x_TD = x_TD.astype(jnp.float32)
    return x_TD if router.b_E is None else x_TD + router.b_E[...][None, :]


def bias_of(router):
    """Of the logits, 0 where the router has none."""
    b_E = getattr(router, "b_E", None)
    return np.zeros(router.num_experts, np.float32) if b_E is None else np.asarray(b_E[...])


def expected(case, router, x, valid, training=True):
    """Ids, dropped per token, logits and scores, by the restatement."""
    name, options = CASES[case]
    k, num_experts = router.top_k, router.num_experts
    given = x = np.asarray(x, np.float32)
    if name != "switch":
        x = x + bias_of(router)[None, :]
    if not training and name in ("swipe", "topology", "rounded", "sinkhorn", "noisy"):
        return (*naive.top_k(x, valid, k), x, naive.softmax(x.astype(np.float64)), x)
    keys = jax.random.split(KEY)
    groups = options.get("groups", 1)
    chosen_by = x
    if name == "noisy":
        normal = naive.draws(jax.random.normal, KEY, len(x), (num_experts,))
        chosen_by = np.asarray(
            x + normal * np.asarray(jax.nn.softplus(given @ router.w_noise_DE[...])), np.float32
        )
    if name == "switch" and training:
        words = naive.draws(jax.random.bits, keys[0], len(x), ((x.shape[1] + 1) // 2,))
        # The low half of a word comes first; each is the middle of one of 2**16 equal parts of (-1, 1).
        halves = np.stack([words & 0xFFFF, words >> 16], axis=-1).reshape(len(x), -1)[:, : x.shape[1]]
        x = x * (
            1 + options.get("jitter", 0.01) * ((halves.astype(np.float32) + np.float32(0.5)) / 2**15 - 1)
        )
    if name == "switch":
        chosen_by = x = x.astype(np.float32) + bias_of(router)[None, :]
    if name == "sigmoid":
        bias = np.asarray(router.selection_bias_E[...])
        in_groups = options.get("expert_groups", 1), options.get("limit_groups", 1)
        ids, dropped = naive.sigmoid_choice(x, bias, valid, k, *in_groups)
        scores = naive.sigmoid(x)
        return ids, dropped, x, scores / scores.sum(axis=1, keepdims=True), x
    if name == "expert_choice":
        ids, dropped = naive.expert_choice(
            x,
            valid,
            k,
            router.max_experts,
            options["capacity_factor" if training else "eval_capacity_factor"],
            groups,
        )
    elif name == "rounded":
        rounding = options.get("rounding", "nearest")
        ids, dropped = naive.rounded(x, valid, k, options["tile"], rounding, router.max_experts, groups)
    elif name == "sinkhorn":
        ids, dropped = naive.sinkhorn(x, valid, k, options["iterations"], groups)
    elif name == "swipe":
        ids, dropped = naive.swipe(x, valid, k, options["devices"], options["budget_factor"], groups)
    elif name == "topology":
        ids, dropped = naive.topology(x, valid, k, options["nodes"], options["off_node_share"], groups)
    elif name in ("hash", "random", "one"):
        if name == "hash":
            ids, dropped = naive.hashed(TOKEN_IDS[: len(x)], valid, k, num_experts, options["hash_seed"])
        elif name == "random":
            bits = naive.draws(jax.random.bits, KEY, len(x), (num_experts,))
            ids, dropped = naive.top_k(bits.astype(float), valid, k)
        else:
            ids = np.where(valid[:, None], (options["expert"] + np.arange(k)) % num_experts, -1)
            dropped = np.zeros(len(x), int)
        return ids, dropped, np.zeros_like(x), np.full(x.shape, 1 / num_experts), x
    else:
        in_groups = options.get("expert_groups", 1), options.get("limit_groups", 1)
        ids, dropped = naive.in_groups(chosen_by, valid, k, *in_groups, best=1)
        # In f32, where what is nearly alike may be alike; a second expert that is refused leaves g1 as it was.
        score = naive.combine(np.asarray(jax.nn.softmax(x, axis=-1)), ids, k > 1)
        if name == "gshard" and training and options.get("random_second", True):
            weights = naive.combine(naive.softmax(x.astype(np.float64)), ids, True)
            refused = naive.draws(jax.random.uniform, keys[0], len(x), ()) >= 2 * weights[:, 1]
            ids[refused, 1] = -1
        if name in ("gshard", "switch"):
            priority = np.zeros(ids.shape)
            if options.get("drop_by") == "score":
                priority = -score
            elif options.get("drop_by") == "random" and training:
                priority = naive.draws(jax.random.uniform, keys[1], len(x), (k,))
            factor = options["capacity_factor"] if training else options.get("eval_capacity_factor", 2.0)
            ids, dropped = naive.capacity(ids, priority, num_experts, factor, groups)
    return ids, dropped, x, naive.softmax(x.astype(np.float64)), chosen_by


def naive_weights(case, router, chosen_by, ids, wanted):
    """Combine weights from the logits by which the choice was made."""
    name, options = CASES[case]
    if name in ("hash", "random", "one"):
        return np.full(ids.shape, 1 / router.top_k)
    scale = options.get("scale", 1.0)
    if name == "sigmoid":
        if not options.get("normalize", router.top_k > 1):
            return scale * naive.combine(naive.sigmoid(chosen_by), ids, False)
        log_sigmoid = -np.logaddexp(0, -np.asarray(chosen_by, np.float64))
        return scale * naive.combine(naive.softmax_of_chosen(log_sigmoid, ids), ids, True)
    scores = naive.softmax(np.asarray(chosen_by, np.float64))
    normalize = options.get("normalize", router.top_k > 1) and name != "expert_choice"
    # GShard and Switch weigh before the capacity.
    ids = wanted if name in ("gshard", "switch") else ids
    if normalize:
        scores = naive.softmax_of_chosen(np.asarray(chosen_by, np.float64), ids)
    return scale * naive.combine(scores, ids, normalize)


def run_all(routers, x, mask, key=KEY, mesh=None):
    """Every router's decision, losses and gradients by x and its parameters, in one compiled program."""
    split = {case: nnx.split(router) for case, router in routers.items()}
    graphdefs = {case: graphdef for case, (graphdef, _) in split.items()}

    def losses(routing, axes):
        weights = (balance_loss(routing, axes), z_loss(routing, axes), importance_loss(routing, axes))
        return jnp.stack([*weights, load_loss(routing, axes)])

    def local(graphdef, state, key, x, mask, token_ids):
        axes = token_axes()

        def scalar(x, state):
            routing = nnx.merge(graphdef, state, others)(x, token_mask_T=mask, token_ids_T=token_ids, key=key)
            # The same for every token, so that it does not depend on how devices share them.
            cotangent_K = jnp.cos(jnp.arange(routing.weights_TK.shape[1], dtype=jnp.float32))
            weighed = jnp.sum(jnp.where(routing.ids_TK >= 0, routing.weights_TK * cotangent_K[None, :], 0))
            weighed = jax.lax.psum(weighed, axes) if axes else weighed
            values = losses(routing, axes)
            return weighed + jnp.sum(values), (routing, values)

        state, others = nnx.state(nnx.merge(graphdef, state), nnx.Param, ...)
        grad = jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)
        (_, (routing, values)), (dx, of_parameters) = grad(x, state)
        of_parameters = jax.tree.map(lambda g: jax.lax.psum(g, axes) if axes else g, of_parameters)
        dropped = jnp.zeros(x.shape[:1], jnp.int32) if routing.dropped_T is None else routing.dropped_T
        per_token = {"ids": routing.ids_TK, "weights": routing.weights_TK, "logits": routing.logits_TE}
        per_token |= {"scores": routing.scores_TE, "dropped": dropped, "dx": dx}
        return per_token, (values, nnx.to_pure_dict(of_parameters))

    def program(states, x, mask, token_ids):
        return {
            case: over_tokens(
                partial(local, graphdefs[case]),
                states[case],
                x,
                mask,
                token_ids,
                replicated=key,
                out_specs=lambda tokens: (tokens, P()),
            )
            for case in graphdefs
        }

    states = {case: state for case, (_, state) in split.items()}
    token_ids = jnp.asarray(TOKEN_IDS[: len(x)])
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        arrays = (jnp.asarray(x), jnp.asarray(mask), token_ids)
        if mesh:
            arrays = jax.device_put(arrays, token_sharding(mesh))
        results = jax.device_get(jax.jit(program)(states, *arrays))
        return {case: (ours, *of_all) for case, (ours, of_all) in results.items()}


def draw_logits(kind="plain", tokens=T, num_experts=E, seed=0):
    x = np.random.default_rng(seed).normal(size=(tokens, num_experts)).astype(np.float32)
    x[:, 1] += 1.0  # an expert that more tokens want than capacities allow
    if kind == "ties":
        x = np.round(x) + 0.0  # no -0, which sorts below 0
    elif kind == "huge":
        x[::3] *= 1e4
    elif kind == "-inf":
        x[::2, 0] = -np.inf
        x[1::4, 2] = -np.inf
    return x


def mask_of(tokens=T):
    return np.arange(tokens) % 5 != 2


def check_against_naive(routers, x, mask, training=True, results=None):
    results = results or run_all(routers, x, mask, KEY if training else None)
    for case, router in routers.items():
        ours, *_ = results[case]
        ids, dropped, logits, scores, chosen_by = expected(case, router, x, mask, training)
        np.testing.assert_array_equal(ours["ids"], ids, err_msg=case)
        np.testing.assert_array_equal(ours["dropped"], dropped, err_msg=case)
        tolerance.assert_close(ours["scores"], scores, tolerance.ROUTING, case)
        if case not in ("hash", "random", "one"):
            np.testing.assert_array_equal(ours["logits"], logits, err_msg=case)
        wanted = naive.top_k(np.asarray(chosen_by), mask, router.top_k)[0]
        weights = naive_weights(case, router, chosen_by, ids, wanted)
        carried = ids >= 0
        tolerance.assert_close(ours["weights"][carried], weights[carried], tolerance.ROUTING, case)
    return results
