"""Every router against its NumPy restatement, on every layout, and what all of them must refuse.

The routers' linear layer is replaced by the identity, so that x is the logits; D = E.
"""

import contextlib
import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import moejax
from moejax.losses import balance_loss, importance_loss, load_loss, z_loss
from moejax.mesh import over_tokens, token_axes, token_sharding
from moejax.routing import ROUTERS, make_router
from moejax.routing.noisy import chance_of_choice, normal_cdf
from moejax.routing.router import LinearRouter
from tests import tolerance
from tests.moejax import naive_routing as naive

T, E, K = 64, 8, 2
KEY = jax.random.key(5)
TOKEN_IDS = np.random.default_rng(7).integers(0, 50_000, T).astype(np.int32)

# name of the case -> (router, options); options hold for T = 64 and any E that 4 divides.
CASES = {
    "topk": ("topk", {}),
    "topk, not normalised": ("topk", {"normalize": False}),
    "noisy": ("noisy", {}),
    "gshard": ("gshard", {"groups": 2, "capacity_factor": 0.7}),
    "gshard by score": ("gshard", {"groups": 8, "capacity_factor": 0.7, "drop_by": "score"}),
    "switch": ("switch", {"groups": 4, "capacity_factor": 0.8, "jitter": 0.2}),
    "switch at random": ("switch", {"capacity_factor": 0.8, "drop_by": "random"}),
    "sigmoid": ("sigmoid", {}),
    "sigmoid in groups": ("sigmoid", {"expert_groups": 4, "limit_groups": 2, "scale": 2.5}),
    "expert_choice": ("expert_choice", {"groups": 2, "max_experts": 3}),
    "sinkhorn": ("sinkhorn", {"groups": 2}),
    "hash": ("hash", {"hash_seed": 3}),
    "random": ("random", {}),
    "one": ("one", {"expert": 3}),
    "swipe": ("swipe", {"groups": 2, "devices": 4}),
    "topology": ("topology", {"groups": 4, "nodes": 2, "off_node_share": 0.2}),
    "rounded up": ("rounded", {"groups": 2, "tile": 4, "rounding": "up"}),
    "rounded down": ("rounded", {"tile": 4, "rounding": "down"}),
    "rounded": ("rounded", {"tile": 4}),
}


@pytest.fixture(autouse=True)
def x_is_the_logits(monkeypatch):
    monkeypatch.setattr(LinearRouter, "logits", lambda self, x_TD: x_TD.astype(jnp.float32))


def top_k_of(case, k):
    return ROUTERS[CASES[case][0]].only_top_k or k


def build(case, num_experts=E, k=K):
    name, options = CASES[case]
    router = make_router(name, num_experts, num_experts, top_k=top_k_of(case, k), rngs=nnx.Rngs(0), **options)
    random = np.random.default_rng(1)
    if name == "noisy":
        router.w_noise_DE[...] = jnp.asarray(random.normal(size=(num_experts, num_experts)), jnp.float32)
    if name == "sigmoid":
        router.selection_bias_E[...] = jnp.asarray(random.normal(size=num_experts) * 0.1, jnp.float32)
    return router


def expected(case, router, x, valid, training=True):
    """Ids, dropped per token, logits and scores, by the restatement."""
    name, options = CASES[case]
    k, num_experts = router.top_k, router.num_experts
    x = np.asarray(x, np.float32)
    if not training and name in ("swipe", "topology", "rounded", "sinkhorn", "noisy"):
        return (*naive.top_k(x, valid, k), x, naive.softmax(x.astype(np.float64)), x)
    keys = jax.random.split(KEY)
    groups = options.get("groups", 1)
    chosen_by = x
    if name == "noisy":
        normal = naive.draws(jax.random.normal, KEY, len(x), (num_experts,))
        chosen_by = np.asarray(
            x + normal * np.asarray(jax.nn.softplus(x @ router.w_noise_DE[...])), np.float32
        )
    if name == "switch" and training:
        uniform = naive.draws(jax.random.uniform, keys[0], len(x), x.shape[1:])
        x = x * (1 + options.get("jitter", 0.01) * (2 * uniform - 1))
        chosen_by = x = x.astype(np.float32)
    if name == "sigmoid":
        bias = np.asarray(router.selection_bias_E[...])
        in_groups = options.get("expert_groups", 1), options.get("limit_groups", 1)
        ids, dropped = naive.sigmoid_choice(x, bias, valid, k, *in_groups)
        scores = naive.sigmoid(x)
        return ids, dropped, x, scores / scores.sum(axis=1, keepdims=True), x
    if name == "expert_choice":
        ids, dropped = naive.expert_choice(x, valid, k, router.max_experts, 1.0, groups)
    elif name == "rounded":
        rounding = options.get("rounding", "nearest")
        ids, dropped = naive.rounded(x, valid, k, options["tile"], rounding, router.max_experts, groups)
    elif name == "sinkhorn":
        ids, dropped = naive.sinkhorn(x, valid, k, 8, groups)
    elif name == "swipe":
        ids, dropped = naive.swipe(x, valid, k, options["devices"], 1.0, groups)
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
        ids, dropped = naive.top_k(chosen_by, valid, k)
        # In f32, where what is nearly alike may be alike; a second expert that is refused leaves g1 as it was.
        score = naive.combine(np.asarray(jax.nn.softmax(x, axis=-1)), ids, k > 1)
        if name == "gshard" and training:
            weights = naive.combine(naive.softmax(x.astype(np.float64)), ids, True)
            refused = naive.draws(jax.random.uniform, keys[0], len(x), ()) >= 2 * weights[:, 1]
            ids[refused, 1] = -1
        if name in ("gshard", "switch"):
            priority = np.zeros(ids.shape)
            if options.get("drop_by") == "score":
                priority = -score
            elif options.get("drop_by") == "random" and training:
                priority = naive.draws(jax.random.uniform, keys[1], len(x), (k,))
            factor = options["capacity_factor"] if training else 2.0
            ids, dropped = naive.capacity(ids, priority, num_experts, factor, groups)
    return ids, dropped, x, naive.softmax(x.astype(np.float64)), chosen_by


def naive_weights(case, router, chosen_by, ids, wanted):
    """Combine weights from the logits by which the choice was made."""
    name, options = CASES[case]
    if name in ("hash", "random", "one"):
        return np.full(ids.shape, 1 / router.top_k)
    if name == "sigmoid":
        return options.get("scale", 1.0) * naive.combine(naive.sigmoid(chosen_by), ids, True)
    scores = naive.softmax(np.asarray(chosen_by, np.float64))
    normalize = options.get("normalize", router.top_k > 1) and name != "expert_choice"
    # GShard and Switch weigh before the capacity.
    return naive.combine(scores, wanted if name in ("gshard", "switch") else ids, normalize)


def run_all(routers, x, mask, key=KEY, mesh=None):
    """Every router's decision, loss and gradients by x, in one compiled program."""
    split = {case: nnx.split(router) for case, router in routers.items()}
    graphdefs = {case: graphdef for case, (graphdef, _) in split.items()}

    def losses(routing, axes):
        weights = (balance_loss(routing, axes), z_loss(routing, axes), importance_loss(routing, axes))
        return jnp.stack([*weights, load_loss(routing, axes)])

    def local(graphdef, state, key, x, mask, token_ids):
        axes = token_axes()

        def scalar(x):
            routing = nnx.merge(graphdef, state)(x, token_mask_T=mask, token_ids_T=token_ids, key=key)
            # The same for every token, so that it does not depend on how devices share them.
            cotangent_K = jnp.cos(jnp.arange(routing.weights_TK.shape[1], dtype=jnp.float32))
            weighed = jnp.sum(jnp.where(routing.ids_TK >= 0, routing.weights_TK * cotangent_K[None, :], 0))
            weighed = jax.lax.psum(weighed, axes) if axes else weighed
            values = losses(routing, axes)
            return weighed + jnp.sum(values), (routing, values)

        (_, (routing, values)), dx = jax.value_and_grad(scalar, has_aux=True)(x)
        dropped = jnp.zeros(x.shape[:1], jnp.int32) if routing.dropped_T is None else routing.dropped_T
        per_token = {"ids": routing.ids_TK, "weights": routing.weights_TK, "logits": routing.logits_TE}
        return per_token | {"scores": routing.scores_TE, "dropped": dropped, "dx": dx}, values

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
        return jax.device_get(jax.jit(program)(states, *arrays))


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
        ours, _ = results[case]
        ids, dropped, logits, scores, chosen_by = expected(case, router, x, mask, training)
        np.testing.assert_array_equal(ours["ids"], ids, err_msg=case)
        np.testing.assert_array_equal(ours["dropped"], dropped, err_msg=case)
        tolerance.assert_close(ours["scores"], scores, tolerance.F32, case)
        if case not in ("hash", "random", "one"):
            np.testing.assert_array_equal(ours["logits"], logits, err_msg=case)
        wanted = naive.top_k(np.asarray(chosen_by), mask, router.top_k)[0]
        weights = naive_weights(case, router, chosen_by, ids, wanted)
        carried = ids >= 0
        tolerance.assert_close(ours["weights"][carried], weights[carried], tolerance.F32, case)
    return results


@pytest.fixture(scope="module")
def shared():
    """All routers on the plain case without a mesh: computed once, looked at by several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearRouter, "logits", lambda self, x_TD: x_TD.astype(jnp.float32))
        routers = {case: build(case) for case in CASES}
        return routers, draw_logits(), mask_of(), run_all(routers, draw_logits(), mask_of())


def test_equals_the_restatement(shared):
    routers, x, mask, results = shared
    check_against_naive(routers, x, mask, results=results)
    dropping = [case for case in CASES if results[case][0]["dropped"].any()]
    assert len(dropping) >= 6, f"the cases are meant to drop, only these do: {dropping}"


def test_values_and_gradients_of_the_losses_and_weights(shared):
    """By central differences of the restatement in f64, with the decision held fast."""
    routers, x, mask, results = shared
    for case in (
        "topk",
        "topk, not normalised",
        "sigmoid in groups",
        "switch",
        "gshard",
        "expert_choice",
        "rounded",
    ):
        router, (ours, values) = routers[case], results[case]
        ids, _, logits, _, _ = expected(case, router, x, mask)
        wanted = naive.top_k(logits, mask, router.top_k)[0]
        counted = {"gshard": wanted[:, :1], "switch": wanted, "rounded": wanted}.get(case, ids)
        jitter = logits / x if case == "switch" else 1.0
        cotangent = np.cos(np.arange(ids.shape[1], dtype=np.float32))
        load = np.array([(counted == e).sum() for e in range(E)])

        def losses(logits, router=router, case=case, ids=ids, wanted=wanted, load=load):
            squashed = naive.sigmoid(logits)
            scores = squashed / squashed.sum(1, keepdims=True) if "sigmoid" in case else naive.softmax(logits)
            weights = naive_weights(case, router, logits, ids, wanted)
            importance = np.array([weights[ids == e].sum() for e in range(E)])
            balance = E * (load / load.sum() * scores[mask].mean(axis=0)).sum()
            z = (np.log(np.exp(logits[mask]).sum(axis=1)) ** 2).mean()
            return np.array([balance, z, importance.var() / importance.mean() ** 2, 0.0]), weights

        def total(x, losses=losses, ids=ids, jitter=jitter, cotangent=cotangent):
            values, weights = losses(x * jitter)
            return values.sum() + np.where(ids >= 0, weights * cotangent, 0).sum()

        tolerance.assert_close(values, losses(logits.astype(np.float64))[0], tolerance.F32, case)
        tolerance.assert_close(ours["dx"], naive.numeric_gradient(total, x), tolerance.F32, case)


def assert_same_on(layout, shared):
    routers, x, mask, alone = shared
    data, expert = layout
    mesh = moejax.make_mesh(data=data, expert=expert, devices=jax.devices()[: data * expert])
    for case, (ours, values) in run_all(routers, x, mask, mesh=mesh).items():
        reference, reference_values = alone[case]
        np.testing.assert_array_equal(ours["ids"], reference["ids"], err_msg=case)
        np.testing.assert_array_equal(ours["dropped"], reference["dropped"], err_msg=case)
        tolerance.assert_close(ours["weights"], reference["weights"], tolerance.F32, case)
        tolerance.assert_close(values, reference_values, tolerance.F32, case)
        tolerance.assert_close(ours["dx"], reference["dx"], tolerance.F32, f"{case}: gradient")


@pytest.mark.parametrize("layout", [(2, 4)], ids=str)
def test_same_on_devices(layout, shared):
    assert_same_on(layout, shared)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(2, 1), (1, 4), (8, 1)], ids=str)
def test_same_on_more_layouts(layout, shared):
    assert_same_on(layout, shared)


@pytest.mark.parametrize("kind", ["ties", "-inf"])
def test_ties_and_experts_that_are_ruled_out(kind):
    routers = {
        case: build(case) for case in ("topk", "gshard", "expert_choice", "swipe", "topology", "sigmoid")
    }
    if kind == "-inf":
        del routers["sigmoid"], routers["expert_choice"]  # to them a score of 0 is a score
    x = draw_logits(kind)
    results = run_all(routers, x, mask_of())
    for case, router in routers.items():
        ids, *_ = expected(case, router, x, mask_of())
        np.testing.assert_array_equal(results[case][0]["ids"], ids, err_msg=case)
        assert np.isfinite(results[case][0]["weights"]).all() and not (ids >= 0)[~mask_of()].any()
        if kind == "-inf":
            assert not (ids[::2] == 0).any(), "an expert with a logit of -inf is never chosen"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "huge"])
@pytest.mark.parametrize(("num_experts", "k"), [(4, 1), (8, 8), (64, 6), (256, 16)])
def test_grid(num_experts, k, kind):
    tokens = 32 if num_experts < 256 else 16
    without = {"topology", "sigmoid in groups"} if k > num_experts // 2 else set()
    if kind == "huge":
        without.add("sinkhorn")  # its restatement, which takes no logarithms, underflows
    routers = {case: build(case, num_experts, k) for case in CASES if case not in without}
    check_against_naive(routers, draw_logits(kind, tokens, num_experts), mask_of(tokens))


@pytest.mark.slow
def test_evaluation_and_one_token():
    routers = {case: build(case) for case in CASES if case != "random"}
    for tokens in (T, 1):
        check_against_naive(routers, draw_logits(tokens=tokens), np.ones(tokens, bool), training=False)


@pytest.mark.slow
def test_bf16_inputs_are_routed_in_f32():
    x = draw_logits().astype(jnp.bfloat16)
    routers = {case: build(case) for case in CASES}
    check_against_naive(routers, np.asarray(x, np.float32), mask_of(), results=run_all(routers, x, mask_of()))


def test_perfect_balance_and_total_collapse_have_finite_gradients():
    for x in (np.zeros((T, E), np.float32), np.tile(np.eye(1, E, dtype=np.float32) * 50, (T, 1))):
        for mask in (np.ones(T, bool), np.zeros(T, bool)):
            ours, values = run_all({"noisy": build("noisy")}, x, mask)["noisy"]
            assert np.isfinite(values).all() and np.isfinite(ours["dx"]).all()


def test_chance_of_choice_is_the_share_of_choices():
    """Of many draws of one expert's noise, the share in which it is chosen."""
    random = np.random.default_rng(0)
    clean, spread, normal = random.normal(size=(3, 1, E))
    spread = np.abs(spread) + 0.2
    noisy = clean + spread * normal
    chance = np.asarray(chance_of_choice(*map(jnp.asarray, (clean, noisy, spread)), 2))[0]
    for e in range(E):
        others = np.sort(np.delete(noisy[0], e))[-2]
        drawn = clean[0, e] + spread[0, e] * random.normal(size=100_000)
        assert (drawn > others).mean() == pytest.approx(chance[e], abs=0.01)


def test_cosine_is_the_cosine():
    router = make_router("cosine", 16, E, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (T, 16))
    x_zero = x.at[3].set(0.0)
    both = jax.jit(lambda: (router(x), jax.grad(lambda x: jnp.sum(router(x).weights_TK[:, 0]))(x_zero)))
    routing, gradient = both()
    projected = np.asarray(x, np.float64) @ np.asarray(router.w_DR[...], np.float64)
    points = np.asarray(router.points_RE[...], np.float64)
    cosine = projected @ points / np.linalg.norm(projected, axis=1)[:, None] / np.linalg.norm(points, axis=0)
    tolerance.assert_close(routing.logits_TE, cosine / 0.3, tolerance.F32)
    np.testing.assert_array_equal(routing.ids_TK, naive.top_k(cosine, np.ones(T, bool), 2)[0])
    assert np.isfinite(gradient).all()


def test_selection_bias_moves_against_the_load():
    router = build("sigmoid")
    before = np.asarray(router.selection_bias_E[...])
    load = np.array([9, 1, 4, 4, 4, 4, 4, 2])
    router.balance(jnp.asarray(load))
    step = np.asarray(router.selection_bias_E[...]) - before
    np.testing.assert_allclose(step, 1e-3 * np.sign(load.mean() - load), atol=1e-7)


def test_router_bias_is_added(monkeypatch):
    monkeypatch.undo()
    router = make_router("topk", 4, E, router_bias=True, rngs=nnx.Rngs(0))
    router.b_E[...] = jnp.arange(float(E))
    x = jax.random.normal(jax.random.key(0), (3, 4))
    bias = router.logits(x) - jnp.dot(x, router.w_DE[...])
    tolerance.assert_close(bias, np.tile(np.arange(E), (3, 1)), tolerance.F32)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("topkk", {}, "router = 'topkk': must be one of topk, .*; the nearest is topk"),
        ("topk", {"top_k": 9}, r"top_k = 9: must be between 1 and num_experts \(8\)"),
        ("switch", {"top_k": 2}, "top_k = 2: must be 1 for this router, or unset"),
        ("gshard", {"top_k": 1}, "top_k = 1: must be 2 for this router, or unset"),
        ("topk", {"jitter": 0.1}, "jitter = 0.1: router topk has no such option; its options are normalize"),
        ("switch", {"capacity_factor": 0.0}, "capacity_factor = 0.0: must be above 0"),
        ("switch", {"drop_by": "luck"}, "drop_by = luck: must be one of position, score, random"),
        ("switch", {"jitter": 1.0}, "jitter = 1.0: must be at least 0 and below 1"),
        ("sigmoid", {"expert_groups": 3}, r"expert_groups = 3: must divide num_experts \(8\)"),
        ("sigmoid", {"expert_groups": 8, "limit_groups": 1}, "limit_groups = 1: leaves a token 1 experts"),
        ("swipe", {"devices": 5}, "devices = 5: must divide num_experts"),
        ("swipe", {"budget_factor": 0.5}, "budget_factor = 0.5: must be at least 1"),
        ("topology", {"nodes": 8}, "nodes = 8: leaves a node 1 experts, fewer than top_k"),
        ("topology", {"nodes": 2, "groups": 3}, r"groups = 3: must be a multiple of nodes \(2\)"),
        ("rounded", {"rounding": "off"}, "rounding = off: must be one of nearest, up, down"),
        ("rounded", {"max_experts": 1}, r"max_experts = 1: must be between top_k \(2\)"),
        ("one", {"expert": 8}, "expert = 8: must be between 0 and 7"),
        ("sinkhorn", {"iterations": 0}, "iterations = 0: must be at least 1"),
    ],
    ids=str,
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_router(name, 16, E, rngs=nnx.Rngs(0), **options)


def test_groups_that_do_not_divide_are_refused_in_training_only():
    router = make_router("switch", E, E, groups=3, rngs=nnx.Rngs(0))
    x = jnp.asarray(draw_logits())
    with pytest.raises(ValueError, match="groups = 3: must divide the 64 tokens of a batch"):
        jax.eval_shape(lambda: router(x, key=KEY))
    assert jax.eval_shape(lambda: router(x)).ids_TK.shape == (T, 1)
    with pytest.raises(ValueError, match="token_ids_T = None: the hash router"):
        make_router("hash", E, E, rngs=nnx.Rngs(0))(x)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ids_TK", jnp.zeros((T,), jnp.int32), r"Routing.ids_TK: must be \[T, K\], got shape \(64,\)"),
        ("ids_TK", jnp.zeros((T, 2)), r"Routing.ids_TK: must be integer\[64, 2\], got float32\[64, 2\]"),
        (
            "weights_TK",
            jnp.zeros((T, 3)),
            r"Routing.weights_TK: must be floating\[64, 2\], got float32\[64, 3\]",
        ),
        ("scores_TE", jnp.zeros((T, 7)), r"Routing.scores_TE: must be floating\[64, 8\]"),
        ("valid_T", jnp.zeros((T,)), r"Routing.valid_T: must be bool\[64\], got float32\[64\]"),
    ],
    ids=str,
)
def test_a_routers_wrong_answer_is_named(field, value, message):
    class Wrong(moejax.TopK):
        def __call__(self, x_TD, **arguments):
            return dataclasses.replace(super().__call__(x_TD, **arguments), **{field: value})

    layer = moejax.MoE(E, 4, E, router=Wrong(E, E, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        layer(jnp.asarray(draw_logits()))


def test_normal_cdf_and_its_slope():
    z = np.linspace(-9, 9, 2001).astype(np.float32)
    value, slope = jax.vmap(jax.value_and_grad(normal_cdf))(z)
    exact = [0.5 * math.erfc(-float(number) * math.sqrt(0.5)) for number in z]
    tolerance.assert_close(value, exact, tolerance.F32, "value")
    density = np.exp(-0.5 * z.astype(np.float64) ** 2) / math.sqrt(2 * math.pi)
    tolerance.assert_close(slope, density, tolerance.F32, "slope")
    # Far out, where only a share of it is left, too: the exponential's own error is all there is.
    tails = z < -3
    tolerance.assert_close(value[tails] / np.asarray(exact)[tails], np.ones(tails.sum()), 4 * tolerance.F32)
