"""Every router against its NumPy restatement, alone and on every layout."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.routing import ROUTERS, router_options
from moejax.routing.router import LinearRouter
from tests import tolerance
from tests.moejax import naive_routing as naive
from tests.moejax.routed import (
    CASES,
    COSINE,
    KEY,
    E,
    T,
    bias_of,
    build,
    check_against_naive,
    draw_logits,
    expected,
    mask_of,
    naive_weights,
    run_all,
    without_matrix,
)


@pytest.fixture(autouse=True)
def x_is_the_logits(monkeypatch):
    monkeypatch.setattr(LinearRouter, "logits", without_matrix)


@pytest.fixture(scope="module")
def shared():
    """All routers on the plain case without a mesh: computed once, looked at by several tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearRouter, "logits", without_matrix)
        routers = {case: build(case) for case in CASES | COSINE}
        return routers, draw_logits(), mask_of(), run_all(routers, draw_logits(), mask_of())


def test_equals_the_restatement(shared):
    routers, x, mask, results = shared
    check_against_naive({case: routers[case] for case in CASES}, x, mask, results=results)
    dropping = [case for case in CASES if results[case][0]["dropped"].any()]
    assert len(dropping) >= 6, f"the cases are meant to drop, only these do: {dropping}"


def test_every_option_of_every_router_is_on_in_a_case():
    count = 0
    for name, router in ROUTERS.items():
        defaults = {
            option: inspect.signature(router.__init__).parameters[option].default
            for option in router_options(name)
        }
        cases = [options for case_of, options in (CASES | COSINE).values() if case_of == name]
        on = {o for options in cases for o, value in options.items() if value != defaults[o]}
        assert on == set(defaults), f"router {name}: {sorted(set(defaults) - on)} have no case"
        count += len(on)
    assert count == sum(len(router_options(name)) for name in ROUTERS) == 54, count


# Whose gradients are compared: two masked tokens, some that lose a choice, ...
ROWS = (0, 1, 2, 7, 33, 63)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_of_the_losses_and_weights(case, shared):
    """By central differences of the restatement in f64, with the decision held fast."""
    routers, x, mask, results = shared
    router, (ours, values, of_parameters) = routers[case], results[case]
    name, options = CASES[case]
    ids, _, logits, _, chosen_by = expected(case, router, x, mask)
    wanted = naive.in_groups(
        chosen_by, mask, router.top_k, options.get("expert_groups", 1), options.get("limit_groups", 1), 1
    )[0]
    counted = {"gshard": wanted[:, :1], "switch": wanted, "rounded": wanted, "swipe": wanted}.get(name, ids)
    jitter = (logits - bias_of(router)) / x if name == "switch" else 1.0
    cotangent = np.cos(np.arange(ids.shape[1], dtype=np.float32))
    load = np.array([(counted == e).sum() for e in range(E)])
    normal = naive.draws(jax.random.normal, KEY, T, (E,)) if name == "noisy" else 0.0
    fixed = name in ("hash", "random", "one")
    squared_variation = lambda load: load.var() / load.mean() ** 2  # noqa: E731

    def losses(x, bias, w_noise):
        logits = x * jitter + bias
        spread = np.logaddexp(0, x @ w_noise)
        noisy = logits + normal * spread
        if fixed:
            logits = np.zeros_like(x)
        squashed = naive.sigmoid(logits)
        scores = squashed / squashed.sum(1, keepdims=True) if name == "sigmoid" else naive.softmax(logits)
        weights = naive_weights(case, router, noisy, ids, wanted)
        importance = np.array([weights[ids == e].sum() for e in range(E)])
        balance = E * (load / load.sum() * scores[mask].mean(axis=0)).sum()
        z = (np.log(np.exp(logits[mask]).sum(axis=1)) ** 2).mean()
        chance = (
            naive.chance(logits, noisy, spread, router.top_k)[mask].sum(axis=0)
            if name == "noisy"
            else np.ones(E)
        )
        return np.array([balance, z, squared_variation(importance), squared_variation(chance)]), weights

    def total(*arguments):
        values, weights = losses(*arguments)
        return values.sum() + np.where(ids >= 0, weights * cotangent, 0).sum()

    w_noise = np.asarray(router.w_noise_DE[...], np.float64) if name == "noisy" else np.zeros((E, E))
    at = (x.astype(np.float64), bias_of(router).astype(np.float64), w_noise)
    tolerance.assert_close(values, losses(*at)[0], tolerance.ROUTING, case)
    dx = naive.numeric_gradient(lambda x: total(x, *at[1:]), at[0], rows=ROWS)
    largest = np.abs(ours["dx"]).max()
    assert np.abs(ours["dx"] - dx)[list(ROWS)].max() <= tolerance.ROUTING * largest, case
    if "b_E" in of_parameters:
        dbias = naive.numeric_gradient(lambda bias: total(at[0], bias, at[2]), at[1])
        tolerance.assert_close(of_parameters["b_E"], dbias, tolerance.ROUTING, case)
    if name == "noisy":
        dnoise = naive.numeric_gradient(lambda w_noise: total(*at[:2], w_noise), at[2], rows=(1, 4))
        difference = (of_parameters["w_noise_DE"] - dnoise)[[1, 4]]
        largest = np.abs(of_parameters["w_noise_DE"]).max()
        assert np.abs(difference).max() <= tolerance.F32 * largest, case


def assert_same_on(layout, shared):
    routers, x, mask, alone = shared
    data, expert = layout
    mesh = moejax.make_mesh(data=data, expert=expert, devices=jax.devices()[: data * expert])
    for case, (ours, values, of_parameters) in run_all(routers, x, mask, mesh=mesh).items():
        reference, reference_values, reference_of_parameters = alone[case]
        for name, gradient in of_parameters.items():
            tolerance.assert_close(
                gradient, reference_of_parameters[name], tolerance.LAYOUT, f"{case}: {name}"
            )
        np.testing.assert_array_equal(ours["ids"], reference["ids"], err_msg=case)
        np.testing.assert_array_equal(ours["dropped"], reference["dropped"], err_msg=case)
        tolerance.assert_close(ours["weights"], reference["weights"], tolerance.LAYOUT, case)
        for one, other in zip(values, reference_values, strict=True):
            tolerance.assert_close(one, other, tolerance.LAYOUT, case)
        tolerance.assert_close(ours["dx"], reference["dx"], tolerance.LAYOUT, f"{case}: gradient")


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
    without = {"topology", "sigmoid in groups", "topk in groups"} if k > num_experts // 2 else set()
    if k > 3:
        without.add("rounded down")  # at most 3 experts per token
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


@pytest.mark.parametrize("kind", ["balance", "collapse", "nothing valid"])
def test_perfect_balance_and_total_collapse_have_finite_gradients(kind, shared):
    x = (
        np.tile(np.eye(1, E, dtype=np.float32) * 200 - 100, (T, 1))
        if kind == "collapse"
        else np.zeros((T, E), np.float32)
    )
    mask = np.full(T, kind != "nothing valid")
    for case, (ours, values, _) in run_all(shared[0], x, mask).items():
        assert np.isfinite(values).all() and np.isfinite(ours["dx"]).all(), case
