"""Delivery is exact against the dense oracle on every layout, under every load, through every exchange."""

import functools
import itertools
import math
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.functional import deliver
from moejax.levels import CAPACITY_FACTOR, ROW_TILE
from tests import tolerance
from tests.moejax.layer_under_load import NAMES, D, Layer, draw, experts, make_mesh, oracle
from tests.moejax.loads import LOADS, balanced
from tests.moejax.oracle import within_capacity

TOKENS_PER_DEVICE = 32

# (data, expert_node, expert); three devices hold 24 experts.
FACTORS = {
    "layout": [(1, 1, 1), (2, 1, 2), (1, 1, 3), (1, 1, 4), (1, 1, 8), (1, 2, 2), (2, 2, 2), (1, 2, 4)],
    "top_k": [1, 2, 8],
    "num_experts": [8, 24, 32],
    "exchange": ["all_to_all", "all_gather", "ragged"],
    "overflow": ["rounds", "drop"],
    "chunks": [1, 2, 4],
    "shadow": [0, 2],
}


def pairwise_cover(factors):
    """Few combinations in which every two values of different factors meet; always the same ones."""
    names = list(factors)
    every = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(*factors.values())
        if values[0] != (1, 1, 3) or values[2] == 24
    ]
    pairs_of = {
        id(case): {(a, case[a], b, case[b]) for a, b in itertools.combinations(names, 2)} for case in every
    }
    missing, cover = set().union(*pairs_of.values()), []
    while missing:
        best = max(every, key=lambda case: len(pairs_of[id(case)] & missing))
        missing -= pairs_of[id(best)]
        cover.append(best)
    return cover


COVER = pairwise_cover(FACTORS)
# One of each kind, and the whole of the machinery in one.
QUICK = [
    dict(layout=(1, 2, 4), top_k=2, num_experts=32, exchange="all_to_all", overflow="rounds", chunks=1, shadow=0),
    dict(layout=(1, 1, 3), top_k=1, num_experts=24, exchange="ragged", overflow="rounds", chunks=1, shadow=2),
    dict(layout=(2, 1, 2), top_k=8, num_experts=8, exchange="all_gather", overflow="drop", chunks=2, shadow=0),
]  # fmt: skip


def name(case):
    return "-".join(str(value).replace(" ", "") for value in case.values())


def check_under_all_loads(*, layout, top_k, num_experts, dtype=np.float32, tol=tolerance.F32, **options):
    devices = math.prod(layout)
    num_tokens = devices * TOKENS_PER_DEVICE
    layer = Layer(make_mesh(*layout), num_experts, **options)
    operands = draw(num_tokens, top_k, num_experts, dtype)
    rng = np.random.default_rng(1)
    rounds, dropped = {}, {}
    for load in LOADS:
        ids = load(rng, num_tokens, top_k, num_experts, devices).astype(np.int32)
        actual, account = layer(ids, *operands)
        served = np.asarray(account.served_TK)
        admitted = (
            ids if options["overflow"] == "rounds" else np.asarray(within_capacity(ids, num_experts, 1.25))
        )
        assert np.sum(account.over_capacity) == np.sum(admitted != ids), load.__name__
        assert not np.any(served & (admitted < 0)), "a choice beyond capacity was served"
        at_sender = int(np.sum(account.at_sender))
        assert 0 <= at_sender <= np.sum((admitted >= 0) & ~served), load.__name__
        if options["overflow"] == "rounds" or options["exchange"] != "all_to_all":
            assert at_sender == 0, "further rounds carry it out, and the others send all they have"
        rounds[load.__name__] = int(np.max(account.rounds))
        dropped[load.__name__] = int(np.sum((ids >= 0) & ~served))
        if options["overflow"] == "rounds":
            assert dropped[load.__name__] == 0, load.__name__
        x, weights, w, dy = operands
        expected = oracle(num_experts)(x, weights, w, np.where(served, ids, -1), dy)
        for what, a, b in zip(NAMES, actual, expected, strict=True):
            tolerance.assert_close(a, b, tol, f"{what} under {load.__name__}")
    return layer, rounds, dropped


@pytest.mark.parametrize("case", QUICK, ids=name)
def test_exact_under_every_load(case):
    _, rounds, dropped = check_under_all_loads(**case)
    assert rounds["balanced"] == 1 and dropped["balanced"] == 0
    if case["overflow"] == "rounds":
        assert max(rounds.values()) > 2, "the case is meant to need further rounds"
    else:
        assert dropped["all_to_one"] > 0, "the case is meant to drop"


@pytest.mark.slow
@pytest.mark.parametrize("case", COVER, ids=name)
def test_exact_under_every_load_pairwise(case):
    check_under_all_loads(**case)


@pytest.mark.slow
def test_float64_is_exact_to_f64():
    with jax.enable_x64(True):
        case = dict(QUICK[0], layout=(1, 2, 2), dtype=np.float64, tol=tolerance.F64)
        check_under_all_loads(**case)


def test_the_cover_meets_every_pair():
    assert len(COVER) <= 50
    for a, b in itertools.combinations(FACTORS, 2):
        for pair in itertools.product(FACTORS[a], FACTORS[b]):
            is_possible = not ((1, 1, 3) in pair and {a, b} == {"layout", "num_experts"} and 24 not in pair)
            assert is_possible == any((case[a], case[b]) == pair for case in COVER)


def within(seconds, function):
    """The function's result, or a failure when it hangs."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"no answer within {seconds} s"
    return results[0]


@pytest.mark.parametrize("varying", [True, False])
def test_data_groups_of_unequal_load_do_not_wait_for_each_other(varying):
    num_tokens, top_k, num_experts = 4 * TOKENS_PER_DEVICE, 2, 8
    layer = Layer(make_mesh(2, 1, 2), num_experts, varying=varying)
    operands = draw(num_tokens, top_k, num_experts)
    rng = np.random.default_rng(0)
    ids = balanced(rng, num_tokens, top_k, num_experts, 4).astype(np.int32)
    ids[num_tokens // 2 :] = num_experts - 1
    actual, account = within(300, lambda: jax.block_until_ready(layer(ids, *operands)))
    rounds = np.asarray(account.rounds)
    assert rounds[0] == rounds[1] and rounds[2] == rounds[3] > 1
    assert rounds[0] == (1 if varying else rounds[2]), "where gradients are summed in the loop, all keep step"
    x, weights, w, dy = operands
    for what, a, b in zip(NAMES, actual, oracle(num_experts)(x, weights, w, ids, dy), strict=True):
        tolerance.assert_close(a, b, tolerance.F32, what)
    if varying:
        for _ in range(20):
            again, _ = layer(ids, *operands)
            jax.tree.map(np.testing.assert_array_equal, again, actual)


def test_what_a_full_bucket_drops_is_counted_at_the_sender():
    num_tokens, num_experts = 2 * TOKENS_PER_DEVICE, 4
    # Device 0 wants only the experts of device 1, just as many as they may take; half of it fits the bucket.
    ids = (2 + np.arange(num_tokens) % 2)[:, None].astype(np.int32)
    ids[TOKENS_PER_DEVICE:] = -1
    for exchange, expected in (("all_to_all", TOKENS_PER_DEVICE // 2), ("ragged", 0), ("all_gather", 0)):
        options = dict(overflow="drop", capacity_factor=1.0, exchange=exchange)
        layer = Layer(make_mesh(1, 1, 2), num_experts, **options)
        _, account = layer(ids, *draw(num_tokens, 1, num_experts))
        assert np.sum(account.at_sender) == expected, exchange
        assert np.sum((ids >= 0) & ~account.served_TK) == expected and not np.any(account.over_capacity)


HARDLY_ANY = {
    "none": (0, dict(chunks=2)),
    "none, gathered": (0, dict(exchange="all_gather")),
    "none, ragged": (0, dict(exchange="ragged")),
    "none, limited": (0, dict(overflow="drop", shadow=1)),
    "one": (1, dict(chunks=2)),
}


@pytest.mark.parametrize(("tokens_per_device", "options"), HARDLY_ANY.values(), ids=HARDLY_ANY)
def test_hardly_any_tokens(tokens_per_device, options):
    num_tokens, top_k, num_experts = 2 * tokens_per_device, 3, 4
    layer = Layer(make_mesh(1, 1, 2), num_experts, **options)
    x, weights, w, dy = draw(num_tokens, top_k, num_experts)
    ids = np.full((num_tokens, top_k), num_experts - 1, np.int32)
    actual, account = layer(ids, x, weights, w, dy)
    served = np.asarray(account.served_TK)
    assert served.shape == ids.shape and account.rounds.tolist() == [1, 1]
    assert served.all() and not np.any(account.over_capacity) and not np.any(account.at_sender)
    assert np.any(account.fill_V) == (num_tokens > 0), "an absent token fills no buffer"
    for what, a, b in zip(NAMES, actual, oracle(num_experts)(x, weights, w, ids, dy), strict=True):
        tolerance.assert_close(a, b, tolerance.F32, what)


@pytest.mark.parametrize("wire", ["bf16", "fp8"])
def test_compressed_rows_are_off_by_what_is_stated(wire):
    num_tokens, top_k, num_experts = 2 * TOKENS_PER_DEVICE, 2, 4
    layer = Layer(make_mesh(1, 1, 2), num_experts, wire=wire, overflow="drop", capacity_factor=4.0)
    x, weights, w, dy = draw(num_tokens, top_k, num_experts)
    ids = balanced(np.random.default_rng(0), num_tokens, top_k, num_experts, 2).astype(np.int32)
    actual, _ = layer(ids, x, weights, w, dy)
    exact = oracle(num_experts)(x, weights, w, ids, dy)
    errors = [tolerance.relative_error(a, b) for a, b in zip(actual, exact, strict=True)]
    bound = {"bf16": tolerance.BF16, "fp8": 2.0**-4}[wire]
    assert 1e-5 < max(errors) < bound, errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overflow": "dorp"}, "overflow = 'dorp': must be one of rounds, drop; the nearest is drop"),
        ({"capacity_factor": math.inf, "overflow": "drop"}, "capacity_factor = inf: must be a positive finite number"),
        ({"axes": ("expert",)}, r"axes = \('expert',\): 'expert' is no mesh axis here; call it inside jax.shard_map"),
        ({"token_axes": ("data",)}, r"token_axes = \('data',\): 'data' is no mesh axis here"),
        ({"ids_TK": np.zeros((3, 2), np.int32)}, r"ids_TK = int32\[3, 2\]: must be \[4, choices\]"),
        ({"weights_TK": np.ones((4, 1), np.float32)}, r"weights_TK = float32\[4, 1\]: must have the shape of ids_TK"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_arguments_are_named(options, message):
    given = dict(
        x_TD=np.ones((4, D), np.float32),
        ids_TK=np.zeros((4, 2), np.int32),
        weights_TK=np.ones((4, 2), np.float32),
        experts=experts(jnp.ones((2, D, D))),
        num_experts=2,
    )
    given |= options
    given |= {name: jnp.asarray(a) for name, a in given.items() if isinstance(a, np.ndarray)}
    with pytest.raises(ValueError, match=message):
        deliver(**given)


def test_axes_of_the_mesh_are_named_where_another_is_asked_for():
    mesh = make_mesh(2, 1, 2)

    def local(x, ids, weights, **axes):
        return deliver(x, ids, weights, experts(jnp.ones((2, D, D))), num_experts=4, overflow="drop", **axes)[
            0
        ]

    arguments = jnp.ones((8, D)), jnp.zeros((8, 2), jnp.int32), jnp.ones((8, 2))
    for axes, message in (
        ({"axes": ("node",)}, r"axes = \('node',\): 'node' is no mesh axis here; there are .*'expert'"),
        (
            {"axes": ("expert",), "token_axes": ("data",)},
            "token_axes = .*: must contain 'expert', one of axes",
        ),
    ):
        tokens = P(("data", "expert"))
        run = jax.shard_map(
            functools.partial(local, **axes), mesh=mesh, in_specs=tokens, out_specs=tokens, check_vma=False
        )
        with pytest.raises(ValueError, match=message):
            run(*arguments)


def test_a_full_buffer_of_experts_drops_the_same_share_of_each():
    # All tokens of one data group choose the last device's experts, within the capacity of the whole batch.
    num_tokens, num_experts = 4 * TOKENS_PER_DEVICE, 8
    layer = Layer(
        make_mesh(2, 1, 2), num_experts, overflow="drop", exchange="all_gather", capacity_factor=1.0
    )
    number = np.arange(num_tokens, dtype=np.int32)[:, None]
    ids = np.where(number < num_tokens // 2, 4 + number % 4, number % 4)
    _, account = layer(ids, *draw(num_tokens, 1, num_experts))
    served = np.asarray(account.served_TK)
    assert not np.any(account.over_capacity)
    for device in range(4):  # of either group, the first and the last half of the senders
        here = slice(device * TOKENS_PER_DEVICE, (device + 1) * TOKENS_PER_DEVICE)
        counts = np.bincount(ids[here][served[here]], minlength=num_experts)
        assert counts.tolist() == ([0, 0, 0, 0, 4, 4, 4, 4] if device < 2 else [4, 4, 4, 4, 0, 0, 0, 0])


def test_wire_bytes_are_those_of_the_formula():
    devices, num_tokens, top_k, num_experts, width = 8, 512, 2, 16, 512
    layer = Layer(make_mesh(1, 1, devices), num_experts)
    T = devices * num_tokens
    shapes = [(T, width), (T, top_k), (num_experts, width, width), (T, top_k)]
    x, weights, w, ids = (
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(shapes, [jnp.float32] * 3 + [jnp.int32], strict=True)
    )
    sent = sent_bytes(jax.jit(layer.forward).lower(x, weights, w, ids).compile().as_text())
    rows_there, rows_back = sorted(sent)[-2:]
    L = num_experts // devices
    share = 1 - math.comb(num_experts - L, top_k) / math.comb(num_experts, top_k)
    expected = CAPACITY_FACTOR * devices * share * num_tokens * width * 4
    rounding = devices * ROW_TILE * width * 4
    assert rows_there == rows_back and expected <= rows_there <= expected + rounding
    assert CAPACITY_FACTOR <= 1.15
    # One pass stands in the straight line, its repetition, a quarter of the size, in the loop.
    first = [size for size in sent if size > 0.3 * rows_there]
    small = [size for size in sent if size < 0.03 * rows_there]
    assert len(first) == 2 and len(small) == 4 and len(sent) == 8
    assert max(small) + sorted(small)[-3] <= 0.03 * rows_there, "ids, weights and masks"


def test_compressed_rows_are_asked_for_in_fewer_bytes():
    # In the program as asked for: XLA's CPU backend carries bf16 rows as f32.
    num_tokens, top_k, num_experts = 64, 2, 16
    shapes = [(8 * num_tokens, D), (8 * num_tokens, top_k), (num_experts, D, D)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    ids = jax.ShapeDtypeStruct((8 * num_tokens, top_k), jnp.int32)
    for wire, expected in (("none", ["f32", "f32"]), ("bf16", ["bf16", "bf16"]), ("fp8", ["ui8", "bf16"])):
        layer = Layer(make_mesh(1, 1, 8), num_experts, wire=wire, overflow="drop")
        text = jax.jit(layer.forward).lower(*arguments, ids).as_text()
        rows = re.findall(rf"all_to_all.*-> tensor<\d+x{D}x(\w+)>", text)
        assert rows == expected


def sent_bytes(text):
    """Bytes of the operand of every all-to-all in a compiled program; a CPU's takes one operand per device."""
    sizes = {"f32": 4, "s8": 1, "pred": 1}
    total = []
    for line in text.splitlines():
        if found := re.search(r"= (\(?.*?\)?) all-to-all\(", line):
            arrays = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
            total.append(sum(sizes[t] * math.prod(map(int, shape.split(","))) for t, shape in arrays))
    return total
