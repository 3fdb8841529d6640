"""MoE blocks of `transformers` with the layer's own numbers: y and every gradient, on one device and on two."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import losses
from tests import tolerance
from tests.moejax.test_published_blocks import BLOCKS, B, D, E, F, S

pytestmark = pytest.mark.parity

# Of each block: the model's name, its classes of block and config, and what its config calls the layer's options.
EXPERTS = dict(hidden_size=D, moe_intermediate_size=F)
DEEPSEEK = EXPERTS | dict(
    num_attention_heads=2, n_routed_experts=E, num_experts_per_tok=3, n_group=4, topk_group=2
)
THEIRS = {
    "DeepSeek-V2": (
        "deepseek_v2",
        "DeepseekV2Moe",
        "DeepseekV2Config",
        DEEPSEEK | dict(topk_method="group_limited_greedy", routed_scaling_factor=16.0, n_shared_experts=2),
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        "DeepseekV3MoE",
        "DeepseekV3Config",
        DEEPSEEK | dict(routed_scaling_factor=2.5, n_shared_experts=1, norm_topk_prob=True),
    ),
    "GLM-4-MoE": (
        "glm4_moe",
        "Glm4MoeMoE",
        "Glm4MoeConfig",
        DEEPSEEK | dict(n_group=1, topk_group=1, routed_scaling_factor=1.5, n_shared_experts=1),
    ),
    "Qwen2-MoE": (
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        "Qwen2MoeConfig",
        EXPERTS
        | dict(
            num_experts=E, num_experts_per_tok=2, norm_topk_prob=False, shared_expert_intermediate_size=10
        ),
    ),
    "GPT-OSS": (
        "gpt_oss",
        "GptOssMLP",
        "GptOssConfig",
        dict(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2),
    ),
}


def names_of_theirs(name, p):
    """The layer's parameters (torch tensors by path) as the block has them."""
    if name == "GPT-OSS":  # gate and up in turns, no transposition
        return {
            "router.weight": p["router", "w_DE"].T,
            "router.bias": p["router", "b_E"],
            "experts.gate_up_proj": p["experts", "w_in"].transpose(2, 3).flatten(2),
            "experts.gate_up_proj_bias": p["experts", "b_in"].transpose(1, 2).flatten(1),
            "experts.down_proj": p["experts", "w_out"],
            "experts.down_proj_bias": p["experts", "b_out"],
        }
    shared = "shared_expert" if name == "Qwen2-MoE" else "shared_experts"
    gate, up = p["shared", "w_in"].unbind(1)
    theirs = {
        "gate.weight": p["router", "w_DE"].T,
        "experts.gate_up_proj": p["experts", "w_in"].flatten(2).transpose(1, 2),
        "experts.down_proj": p["experts", "w_out"].transpose(1, 2),
        f"{shared}.gate_proj.weight": gate.T,
        f"{shared}.up_proj.weight": up.T,
        f"{shared}.down_proj.weight": p["shared", "w_out"].T,
    }
    if name == "Qwen2-MoE":
        theirs["shared_expert_gate.weight"] = p["shared", "w_gate_D1"].T
    return theirs


def run_theirs(name, params, selection_bias_E, x, dy):
    """y, d x and the gradients by the layer's paths, in f64 but for what they compute in f32 themselves."""
    import torch  # here, so that the file can be collected without it

    model, cls, config_cls, options = THEIRS[name]
    configs = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    blocks = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    block = getattr(blocks, cls)(getattr(configs, config_cls)(**options)).double()
    tensors = {
        path: torch.tensor(np.asarray(value), dtype=torch.float64, requires_grad=True)
        for path, value in params.items()
    }
    theirs = names_of_theirs(name, tensors)
    assert theirs.keys() == dict(block.named_parameters()).keys()
    assert {n: p.shape for n, p in theirs.items()} == {n: p.shape for n, p in block.named_parameters()}
    if selection_bias_E is not None:
        theirs["gate.e_score_correction_bias"] = torch.tensor(selection_bias_E, dtype=torch.float64)
    x, dy = (torch.tensor(np.asarray(a), dtype=torch.float64) for a in (x, dy))
    x.requires_grad = True
    y = torch.func.functional_call(block, theirs, (x,))
    y = y[0] if isinstance(y, tuple) else y
    y.backward(dy)
    return y.detach().numpy(), x.grad.numpy(), {path: t.grad.numpy() for path, t in tensors.items()}


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("name", THEIRS)
def test_equals_the_block_of_transformers(name, devices):
    options = BLOCKS[name] | dict(balance_weight=0.0)  # their balance loss is a function of the whole model
    layer = moejax.MoE(D, F, E, **options, rngs=nnx.Rngs(0))
    draw = lambda number, shape: 0.2 * jax.random.normal(jax.random.key(number), shape)  # noqa: E731
    selection_bias_E = None
    if options.get("router") == "sigmoid":
        layer.router.selection_bias_E[...] = draw(1, E)
        selection_bias_E = np.asarray(layer.router.selection_bias_E[...])
    biases = (getattr(layer.router, "b_E", None), layer.experts.b_in, layer.experts.b_out)
    for number, bias in enumerate(biases):
        if bias is not None:
            bias[...] = draw(number, bias.shape)
    x, dy = jax.random.normal(jax.random.key(7), (2, B, S, D))
    graphdef, params, others = nnx.split(layer, nnx.Param, ...)

    def value(params, x):
        y, _ = nnx.merge(graphdef, params, others)(x)
        return jnp.sum(y * dy), y

    mesh = moejax.make_mesh(expert=devices, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        run = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))
        (_, y), (grads, dx) = run(params, x)
    flat = lambda state: {path: leaf[...] for path, leaf in nnx.to_flat_state(state)}  # noqa: E731
    expected_y, expected_dx, expected = run_theirs(name, flat(params), selection_bias_E, x, dy)
    tolerance.assert_close(y, expected_y, tolerance.F32, "y")
    tolerance.assert_close(dx, expected_dx, tolerance.F32, "x")
    actual = flat(grads)
    assert actual.keys() == expected.keys()
    for path, gradient in expected.items():
        tolerance.assert_close(actual[path], gradient, tolerance.F32, ".".join(path))


def test_their_balance_loss_is_top_k_times_ours():
    import torch
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = np.random.default_rng(0).normal(size=(B * S, E)).astype(np.float32)
    for top_k in (1, 3):
        router = moejax.make_router("topk", D, E, top_k=top_k, rngs=nnx.Rngs(0))
        router.w_DE[...] = jnp.eye(D, E)  # the tokens are the logits
        theirs = load_balancing_loss_func((torch.tensor(logits),), E, top_k)
        ours = losses.balance_loss(router(jnp.asarray(logits)))
        tolerance.assert_close(ours * top_k, theirs.numpy(), tolerance.ROUTING)
