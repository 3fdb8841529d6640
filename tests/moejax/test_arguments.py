"""Every argument of everything public is refused by name: the cases are made from the signatures.

An argument without bad values here fails the test, and so does a public function that is not listed.
"""

import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import custom_ops
import moejax
from custom_ops.checks import shown
from moejax import functional
from moejax.cost import Link
from moejax.routing import ROUTERS, router_options
from tests.moejax import wrong_sizes

B, S, T, D, F, E, K, V, M = 2, 4, 8, 8, 8, 4, 2, 11, 1
X_TD, W_EDF = jnp.ones((T, D)), jnp.ones((E, D, F))
IDS_TK, WEIGHTS_TK = jnp.zeros((T, K), jnp.int32), jnp.ones((T, K))
PLAN = custom_ops.make_plan(IDS_TK, E)
X_BSD, TOKENS_BS = jnp.ones((B, S, D)), jnp.zeros((B, S), jnp.int32)
KEY = jax.random.key(0)


def rngs():
    return nnx.Rngs(0)


MODEL = dict(vocab_size=V, num_layers=2, d_model=D, num_heads=2, d_hidden=F, moe_layers=(1,))
MOE = dict(d_hidden=F, num_experts=E)
SIZES = dict(d_model=D, num_experts=E)


def make_moe():
    return moejax.MoE(D, F, E, keep_demand=True, rngs=rngs())


def make_transformer():
    return moejax.Transformer(**MODEL, moe=MOE, rngs=rngs())


def make_ffn():
    return moejax.FeedForward(D, F, rngs=rngs())


def make_attention():
    return moejax.Attention(D, 2, rngs=rngs())


shapes_of = functools.cache(nnx.eval_shape)


def of(make, method):
    """A method of a module that is made only as shapes, and traced."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        return jax.eval_shape(lambda module: method(module, *args, **kwargs), shapes_of(make))

    return call


ROUTED = dict(x_TD=X_TD, token_mask_T=jnp.ones(T, bool), token_ids_T=IDS_TK[:, 0], key=KEY)
AT_EXPERTS = dict(x_TD=X_TD, plan=PLAN, weights_TK=WEIGHTS_TK)
DELIVERED = dict(
    x_TD=X_TD, ids_TK=IDS_TK, weights_TK=WEIGHTS_TK, experts=lambda x_TD, *_: x_TD, num_experts=E
)
PRODUCT = dict(group_sizes_E=PLAN.group_sizes_P)
ROWS = jnp.ones((T * K, D))

# Name -> (what is called, arguments that are right). Of an argument that is not given, the default is right.
CALLS = {
    "route": (functional.route, dict(logits_TE=jnp.ones((T, E)), top_k=K)),
    "on_rows": (functional.on_rows, dict(fn=lambda rows, sizes: rows)),
    "moe": (functional.moe, DELIVERED),
    "deliver": (functional.deliver, DELIVERED),
    "make_plan": (custom_ops.make_plan, dict(dest_TK=IDS_TK, num_destinations=E)),
    "permute": (custom_ops.permute, AT_EXPERTS),
    "unpermute": (custom_ops.unpermute, dict(rows_ND=ROWS, plan=PLAN, weights_TK=WEIGHTS_TK)),
    "grouped_matmul": (custom_ops.grouped_matmul, dict(rows_ND=ROWS, w_EDF=W_EDF) | PRODUCT),
    "grouped_matmul_dlhs": (custom_ops.grouped_matmul_dlhs, dict(dout_NF=ROWS, w_EDF=W_EDF) | PRODUCT),
    "grouped_matmul_drhs": (custom_ops.grouped_matmul_drhs, dict(rows_ND=ROWS, dout_NF=ROWS) | PRODUCT),
    "swiglu": (custom_ops.swiglu, dict(hidden_N2F=ROWS)),
    "swiglu_backward": (
        custom_ops.swiglu_backward,
        dict(hidden_N2F=ROWS, da_NF=ROWS[:, : D // 2], weight_N=jnp.ones(T * K)),
    ),
    "make_mesh": (moejax.make_mesh, {}),
    "make_router": (moejax.make_router, dict(name="topk", rngs=rngs()) | SIZES),
    "MoE": (moejax.MoE, dict(d_model=D, rngs=rngs()) | MOE),
    "MoE.__call__": (of(make_moe, moejax.MoE.__call__), dict(x=X_BSD)),
    "MoE.follow": (of(make_moe, moejax.MoE.follow), dict(load_E=jnp.ones(E))),
    "Attention": (moejax.Attention, dict(d_model=D, num_heads=2, rngs=rngs())),
    "Attention.__call__": (
        of(make_attention, moejax.Attention.__call__),
        dict(x_BSD=X_BSD, segments_BS=None, positions_BS=TOKENS_BS),
    ),
    "Attention.rotation": (of(make_attention, moejax.Attention.rotation), dict(positions_BS=TOKENS_BS)),
    "FeedForward": (moejax.FeedForward, dict(d_model=D, d_hidden=F, rngs=rngs())),
    "FeedForward.__call__": (of(make_ffn, moejax.FeedForward.__call__), dict(x=X_BSD)),
    "RMSNorm": (moejax.RMSNorm, dict(width=D)),
    "RMSNorm.__call__": (of(lambda: moejax.RMSNorm(D), moejax.RMSNorm.__call__), dict(x=X_BSD)),
    "Experts": (moejax.Experts, dict(num_experts=E, d_model=D, d_hidden=F, rngs=rngs())),
    "Experts.__call__": (of(lambda: moejax.Experts(E, D, F, rngs=rngs()), moejax.Experts.__call__), AT_EXPERTS),
    "Transformer": (moejax.Transformer, dict(moe=MOE, rngs=rngs()) | MODEL),
    "Transformer.__call__": (of(make_transformer, moejax.Transformer.__call__), dict(tokens_BS=TOKENS_BS)),
    "Transformer.routings": (of(make_transformer, moejax.Transformer.routings), dict(tokens_BS=TOKENS_BS)),
    "Transformer.balance_routers": (
        of(make_transformer, moejax.Transformer.balance_routers),
        dict(load_ME=jnp.ones((M, E))),
    ),
    "Transformer.logits": (of(make_transformer, moejax.Transformer.logits), dict(hidden_BSD=X_BSD)),
    "Transformer.loss": (
        of(make_transformer, moejax.Transformer.loss),
        dict(hidden_BSD=X_BSD, targets_BS=TOKENS_BS, chunk=4),
    ),
    "Transformer.init_cache": (of(make_transformer, moejax.Transformer.init_cache), dict(batch_size=B, window=S)),
    **{f"router {name}": (cls, dict(rngs=rngs()) | SIZES) for name, cls in ROUTERS.items()},
    **{f"router {name}.__call__": (of(lambda cls=cls: cls(D, E, rngs=rngs()), cls.__call__), ROUTED)
       for name, cls in ROUTERS.items()},
    **{f"router {name}.balance": (of(lambda cls=cls: cls(D, E, rngs=rngs()), cls.balance), dict(load_E=jnp.ones(E)))
       for name, cls in ROUTERS.items()},
}  # fmt: skip

# Results and states, which the library makes and a caller reads; and names that are no functions.
RECORDS = {
    *("BatchLoad", "Choices", "KVCache", "MoEStats", "Router", "RouterState", "RouterStats", "Routing"),
    *("DispatchPlan", "Account", "GROUPED_PRODUCT", "ROUTERS", "functional", "TopK"),
}

NOT_WHOLE = ["3", 2.0, True, math.nan, [2], 2.5, 10**400, -(10**400), 10**5000]
NOT_A_NUMBER = ["0.1", True, math.nan, [0.1], jnp.ones(2), -1, -math.inf, 10**400, 10**5000]
SIZE, COUNT = [*NOT_WHOLE, 0, -1], [*NOT_WHOLE, -1]
WEIGHT, POSITIVE = [*NOT_A_NUMBER, math.inf], [*NOT_A_NUMBER, math.inf, 0, 0.0]
FLAG, NAME = [1, 0.0, "yes", [True]], ["nope", "", 3, True, ["none"]]
DTYPE = [jnp.int32, "int8", "nope", bool, jnp.complex64, 3]
AXES = ["data", 3, ("data", "data"), (3,), ("nowhere",)]
MODULE = [3, jax.nn.relu, ["topk"], moejax.TopK]


def not_array(rank, wrong_dtype):
    bad = [[1.0, 2.0], 3, "x", rngs(), jnp.ones((1,) * (rank + 1), jnp.float32).astype(wrong_dtype)]
    return [*bad, np.ones((2,) * (rank + 1)), np.ones((2,) * rank, wrong_dtype)]


def floats(rank):
    return not_array(rank, np.int32)


def integers(rank):
    return not_array(rank, np.float32)


NOT_EXPERTS = [3, "relu", None, type, np.add, jnp.add, lambda x_TD: x_TD, lambda x_TD, *_: x_TD[:, :3]]
HIDDEN = [*floats(3), jnp.ones((B, S, 1)), jnp.ones((B, S, D + 1))]
OF_TOKENS = [*integers(2), TOKENS_BS[:, :1], TOKENS_BS[:1], jnp.zeros((B, S + 1), jnp.int32)]
HEADS = dict(B=B, S=S, G=2, h=D // 2)
ANY_RANK = [[1.0], 3, "x", rngs(), {"a": jnp.ones(D)}]
LOADS_E = [*ANY_RANK, jnp.float32(1), jnp.ones(1), jnp.ones(2), jnp.ones(E + 1)]
BAD = {
    **dict.fromkeys(("d_model", "d_hidden", "width", "num_experts", "vocab_size", "num_layers"), SIZE),
    **dict.fromkeys(("num_heads", "num_kv_heads", "chunks", "chunk", "batch_size", "window"), SIZE),
    **dict.fromkeys(("groups", "expert_groups", "limit_groups", "nodes", "tile", "iterations"), SIZE),
    **dict.fromkeys(("num_destinations", "bucket_rows", "projection", "max_experts", "top_k", "shared_hidden"), SIZE),
    **dict.fromkeys(("shadow", "shared_experts", "expert", "hash_seed"), COUNT),
    **dict.fromkeys(("balance_weight", "z_weight", "importance_weight", "load_weight"), WEIGHT),
    **dict.fromkeys(("orthogonality_weight", "out_scale", "bias_rate"), WEIGHT),
    **dict.fromkeys(("buffer_factor", "capacity_factor", "eval_capacity_factor", "scale"), POSITIVE),
    **dict.fromkeys(("rope_theta", "budget_factor"), POSITIVE),
    "jitter": [*WEIGHT, 1.5],
    "off_node_share": [*WEIGHT, 1.5],
    **dict.fromkeys(("expert_bias", "keep_demand", "normalize", "router_bias", "random_second"), FLAG),
    **dict.fromkeys(("tie_embeddings", "observe", "bias", "unique", "shared_gate"), FLAG),
    **dict.fromkeys(("exchange", "overflow", "wire", "received", "balance_over", "drop_by", "rounding"), NAME),
    **dict.fromkeys(("activation", "remat", "implementation", "name"), NAME),
    "axis": ["nope", "", 3, True, ["none"]],
    "router": [*MODULE, "nope", {}, moejax.RMSNorm(D), moejax.TopK(D, 2 * E, rngs=rngs()),
               moejax.TopK(2 * D, E, rngs=rngs())],
    "experts": [*MODULE, "reluu", {}, [jax.nn.relu], moejax.Experts(2 * E, D, F, rngs=rngs())],
    "devices": [3, "gpu", [], [0, 1], True],
    "rngs": [0, KEY, "0", {"params": 0}, nnx.Rngs(dropout=1)],
    "dtype": DTYPE,
    "key": [0, 1.5, "key", jnp.ones(2), jax.random.split(KEY), [0, 1], rngs()],
    "fn": [3, "relu", jnp.ones(2), type, np.add, jnp.add, lambda rows_ND: rows_ND],
    "links": [3, "fast", [Link], *wrong_sizes.links()],
    "moe": [3, "moe", [MOE], {1: 3}, {"d_hidden": F}, {"num_experts": E}, MOE | {"dtype": jnp.float32},
            MOE | {1: 2}],
    "moe_of_layer": [3, "moe", [MOE], {0: MOE}, {1: {"d_hidden": F}}, {1: 3}, {1: {1: 3}}, {"1": MOE}, {1: None}],
    "moe_layers": [1, "all", (2,), (-1,), (True,), (1.0,), {"1": 1}],
    **dict.fromkeys(("axes", "token_axes"), AXES),
    "shadow of deliver": [1, "auto", True, *wrong_sizes.shadows(E)],
    "plan": [None, (1, 2), PLAN.position_TK],
    "cache": [3, {}, (X_BSD, X_BSD), *wrong_sizes.caches(**HEADS)],
    "batch_load": [3, {}, jnp.ones(E), *wrong_sizes.batch_loads(E)],
    # Arrays
    "x_TD": [*floats(2), jnp.ones((T, D + 1))],
    **dict.fromkeys(("logits_TE", "rows_ND"), floats(2)),
    "weights_TK": [*floats(2), jnp.ones((T, 1)), jnp.ones((1, K)), jnp.ones((T, K + 1))],
    "dout_NF": [*floats(2), jnp.ones((T * K + 1, D + 1))],
    "hidden_N2F": [*floats(2), jnp.ones((T * K, 7))],
    "da_NF": [*floats(2), jnp.ones((T * K, 1)), jnp.ones((1, D // 2))],
    "w_EDF": floats(3),
    "weight_N": [*floats(1), jnp.ones(1), jnp.ones(T * K + 1)],
    "dest_TK": [*integers(2), jnp.zeros((T, 0), jnp.int32)],
    "ids_TK": [*integers(2), IDS_TK[:1], jnp.zeros((T + 1, K), jnp.int32)],
    "group_sizes_E": [*integers(1), jnp.ones(1, jnp.int32), jnp.ones(E + 1, jnp.int32)],
    "load_E": [*LOADS_E, jnp.ones((3, E))],
    "load_ME": [*LOADS_E, jnp.ones(E), jnp.ones((M, 1)), jnp.ones((M + 1, E))],
    "x": [*ANY_RANK, jnp.ones((T, D), jnp.int32), jnp.ones((T, D + 1)), jnp.float32(1)],
    **dict.fromkeys(("x_BSD", "hidden_BSD"), HIDDEN),
    "tokens_BS": integers(2),
    **dict.fromkeys(("segments_BS", "positions_BS", "targets_BS"), OF_TOKENS),
    "rotation_BS2f": [*floats(4), jnp.ones((B, S, 2, 1)), jnp.ones((B, 1, 2, 2)), jnp.ones((1, S, 2, 2))],
    "token_mask": [[True], 1, jnp.ones((B, S)), jnp.ones((B, S + 1), bool)],
    "token_ids": [[1], 1, jnp.ones((B, S)), jnp.ones((B, S + 1), jnp.int32)],
    "token_mask_T": [[True] * T, 1, jnp.ones(T), jnp.ones(T + 1, bool)],
    "token_ids_T": [[1] * T, 1, jnp.ones(T), jnp.ones((T, 1), jnp.int32), jnp.zeros(1, jnp.int32),
                    jnp.zeros(T + 1, jnp.int32)],
}  # fmt: skip
# Where a name means something else, or more is allowed.
BAD |= {
    **dict.fromkeys(("experts of moe", "experts of deliver"), NOT_EXPERTS),
    "plan of Experts.__call__": [None, (1, 2), PLAN.position_TK, custom_ops.make_plan(IDS_TK, E + 1)],
    "batch_load of Transformer.__call__": [3, {}, jnp.ones((M, E)), *wrong_sizes.batch_loads(E, M)],
    "cache of Transformer.__call__": [3, {}, *wrong_sizes.caches(MODEL["num_layers"], **HEADS)],
    "positions_BS of Attention.rotation": integers(2),
    "group_sizes_E of grouped_matmul_drhs": integers(1),
    "rows_ND of grouped_matmul": [*floats(2), jnp.ones((T * K, D + 1))],
    "rows_ND of unpermute": [*floats(2), jnp.ones((1, D)), jnp.ones((T * K + 1, D))],
    "capacity_factor of moe": [*NOT_A_NUMBER, 0],
    "capacity_factor of deliver": [*NOT_A_NUMBER, 0],
    "x_TD of permute": [[1.0, 2.0], 3, "x", jnp.ones(T), jnp.ones((T + 1, D))],
    **dict.fromkeys(("x_TD of moe", "x_TD of deliver"), floats(2)),
    "axis of RMSNorm": NAME,
    **{f"{axis} of make_mesh": [*SIZE, 3, 16] for axis in ("expert_node", "expert", "tensor")},
    "data of make_mesh": [*NOT_WHOLE, 0, -2, 1, 3],
    "devices of router swipe": SIZE,
    **{f"x_TD of router {name}.__call__": floats(2) for name in ("hash", "random", "one")},
}
# What the message calls an argument that only hands on a name.
CALLED = {"name of make_router": "router"}


def parameters_of(call):
    """The arguments that can be given by name, and whether None is allowed for each."""
    # A module's metaclass hides the arguments of its `__init__`.
    signature = inspect.signature(call.__init__ if isinstance(call, type) else call)
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = {n: p for n, p in signature.parameters.items() if p.kind not in kinds and n != "self"}
    return {name: p.default is None or "None" in str(p.annotation) for name, p in named.items()}


@pytest.mark.parametrize("name", CALLS)
def test_every_argument_is_refused_by_name(name):
    call, right = CALLS[name]
    arguments = parameters_of(call)
    assert arguments, "a case without arguments checks nothing"
    for argument, may_be_none in arguments.items():
        values = BAD.get(f"{argument} of {name}", BAD.get(argument))
        assert values, f"{name}: no bad values for its argument {argument}"
        for value in [*values, *([] if may_be_none else [None])]:
            called = CALLED.get(f"{argument} of {name}", argument)
            try:
                call(**right | {argument: value})
            except (ValueError, TypeError) as error:
                message = str(error)
            else:
                pytest.fail(f"{name}: {argument} = {shown(value)} is taken")
            assert message.startswith(called) and " = " in message and "\n" not in message, message
            # A part or the type may be named.
            of_whole = {"experts", "router", "moe_layers", "token_axes", "moe_of_layer", "links"}
            of_whole |= {"batch_load", "cache", "shadow", "plan"}
            assert shown(value) in message or argument in of_whole, message


def test_right_arguments_are_taken():
    for call, right in CALLS.values():
        given = dict(right)

        def run(call=call, given=given):
            if "rngs" in given:
                given["rngs"] = rngs()  # of this trace
            call(**given)

        jax.eval_shape(run)


LINKS = {"expert": Link(1.0, 1.0, 1.0), "expert_node": Link(1.0, 1.0, 1.0)}
LARGE = 10_000_000_000  # beyond int32


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("MoE.__call__", lambda: dict(key=rngs().params.key, batch_load=wrong_sizes.batch_load(E))),
        ("MoE.__call__", lambda: dict(batch_load=moejax.BatchLoad(jnp.ones(E), 8, 2.0))),
        ("MoE", lambda: dict(links=LINKS, router=moejax.TopK(D, E, rngs=rngs()))),
        ("deliver", lambda: dict(links=LINKS)),
        ("Transformer", lambda: dict(moe_of_layer={np.int32(1): MOE})),
        ("Transformer.__call__", lambda: dict(key=rngs().params.key, batch_load=wrong_sizes.batch_load(E, M))),
        ("Transformer.__call__", lambda: dict(cache=make_transformer().init_cache(B, S + 1))),
        ("Attention", lambda: dict(rope_theta=LARGE)),
        ("router hash", lambda: dict(hash_seed=2**32 - 1)),
        ("make_mesh", lambda: dict(data=1, expert=2, tensor=2, devices=jax.devices()[:4])),
        ("on_rows", lambda: dict(fn=lambda *_: None)),
    ],
)  # fmt: skip
def test_unusual_arguments_are_taken(name, right):
    call, usual = CALLS[name]

    def run():
        own = {"rngs": rngs()} if "rngs" in usual else {}  # of this trace
        call(**usual | own | right())

    jax.eval_shape(run)


def test_a_model_without_moe_layers_takes_no_batch_load():
    dense = of(
        lambda: moejax.Transformer(**MODEL | dict(moe_layers=()), rngs=rngs()), moejax.Transformer.__call__
    )
    with pytest.raises(
        ValueError, match=r"^batch_load = BatchLoad\(.*: must be None: there are no MoE layers"
    ):
        dense(TOKENS_BS, batch_load=wrong_sizes.batch_load(E, M))


def test_layers_that_follow_no_demand_take_a_load_of_several():
    follow = of(lambda: moejax.MoE(D, F, E, rngs=rngs()), moejax.MoE.follow)
    follow(jnp.ones((3, E)))
    with pytest.raises(ValueError, match=r"^load_E = float32\[3, 1\]: must be \[3, 4\], choices of each"):
        follow(jnp.ones((3, 1)))


def test_a_mesh_that_does_not_fit_names_the_axis_and_what_is_left():
    for sizes, message in (
        (dict(expert=3), r"^expert = 3: must divide 4, the devices that the axes before it leave of 4$"),
        (
            dict(expert=2, tensor=4),
            r"^tensor = 4: must divide 2, the devices that the axes before it leave of 4$",
        ),
        (dict(data=1, expert=2), r"^data = 1: must be 2, the devices that the other axes leave of 4, or -1"),
    ):
        with pytest.raises(ValueError, match=message):
            moejax.make_mesh(**sizes, devices=jax.devices()[:4])


def test_a_large_rope_theta_rotates():
    attention = moejax.Attention(D, 2, rope_theta=LARGE, rngs=rngs())
    turns = attention.rotation(TOKENS_BS + 1)
    np.testing.assert_allclose(turns[..., 0, 1], np.cos(LARGE**-0.5), rtol=1e-6)


def test_nothing_public_is_left_out():
    public = {name for module in (moejax, custom_ops, functional) for name in vars(module) if name[0] != "_"}
    callables = {n for n in public for m in (moejax, custom_ops, functional) if callable(getattr(m, n, None))
                 and getattr(m, n).__module__.startswith(("moejax", "custom_ops"))
                 and getattr(m, n).__module__ not in ("moejax.arguments", "custom_ops.checks")}  # fmt: skip
    assert callables - RECORDS - {"softmax_top_k"} == CALLS.keys() & callables
    for cls in (
        moejax.MoE,
        moejax.Attention,
        moejax.Transformer,
        moejax.FeedForward,
        moejax.Experts,
        moejax.RMSNorm,
    ):
        methods = {
            n for n, f in vars(cls).items() if inspect.isfunction(f) and (n[0] != "_" or n == "__call__")
        }
        assert {f"{cls.__name__}.{method}" for method in methods} <= CALLS.keys()


@pytest.mark.parametrize("router", ROUTERS)
def test_options_of_a_router_are_refused_by_name_through_the_layer(router):
    for option in router_options(router):
        values = BAD.get(f"{option} of router {router}", BAD[option])
        with pytest.raises(ValueError, match=f"^{option} = "):
            moejax.MoE(D, F, E, router=router, rngs=rngs(), **{option: values[0]})
    with pytest.raises(
        ValueError, match=r"^num_expert = 3: router .* the nearest argument of the layer is num_experts"
    ):
        moejax.MoE(D, F, E, router=router, num_expert=3, rngs=rngs())
    if router != "noisy":
        with pytest.raises(ValueError, match=r"^load_weight = 0\.1: only router noisy knows"):
            moejax.MoE(D, F, E, router=router, load_weight=0.1, rngs=rngs())


def test_the_router_that_has_an_option_is_named():
    with pytest.raises(
        ValueError, match=r"jitter = 0\.1: router topk has .* option; .*; it is an option of switch"
    ):
        moejax.MoE(D, F, E, jitter=0.1, rngs=rngs())


def test_what_the_mesh_does_not_divide_is_refused_by_name():
    layer, model = make_moe(), make_transformer()
    by_sequence = moejax.MoE(D, F, E, balance_over="sequence", rngs=rngs())
    with jax.set_mesh(moejax.make_mesh(expert=4, devices=jax.devices()[:4])):
        for call, message in (
            (
                lambda: layer(X_TD[:6]),
                r"^x = float32\[6, 8\]: its 6 tokens must be a multiple of 4, .* 'expert' \(4\)",
            ),
            (lambda: by_sequence(X_BSD), r"^x = float32\[2, 4, 8\]: its 2 sequences must be a multiple of 4"),
            (
                lambda: model(TOKENS_BS[:, :3]),
                r"^tokens_BS = int32\[2, 3\]: its 6 tokens must be a multiple of 4",
            ),
            (
                lambda: model.loss(X_BSD, TOKENS_BS, chunk=4),
                r"^hidden_BSD = .*: its 2 sequences must be a multiple",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    narrow = moejax.MoE(D, 6, E, rngs=rngs())
    with (
        jax.set_mesh(moejax.make_mesh(tensor=4, devices=jax.devices()[:4])),
        pytest.raises(
            ValueError, match=r"^w_in = float32\[4, 8, 2, 6\]: its axis 'hidden' must be a multiple of 4"
        ),
    ):
        narrow(X_TD)
