"""Experts: grouped FFNs over the rows of a plan.

Shapes: T tokens, D model width, F hidden width of an expert, H columns before the activation (F; 2F if gated),
E experts on this device, K experts per token, N rows.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from custom_ops import (
    GROUPED_PRODUCT,
    DispatchPlan,
    grouped_matmul,
    grouped_matmul_dlhs,
    grouped_matmul_drhs,
    permute,
    unpermute,
)
from custom_ops.checks import instance_of, one_of, require, require_shape
from moejax.activations import ACTIVATIONS, Activation
from moejax.arguments import checked
from moejax.layers import init_matrix
from moejax.mesh import tensor_axes


class Experts(nnx.Module):
    """E feed-forward networks of one shape, as two stacked matrices.

    Each expert is initialised as the dense FFN it is: the fan-in is that of one expert, not of the stack.

    Args:
      activation: name in `ACTIVATIONS`.
      bias: give each expert a bias before the activation and one of its output, 0 at first. They take the general path
        of single products, which keeps more for backward than the fused one.

    Raises:
      ValueError: an unknown activation; names the nearest.
    """

    @checked(activation=one_of(ACTIVATIONS))
    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_hidden: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        out_scale: float = 1.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        parts = ACTIVATIONS[activation].columns
        self.activation = activation
        self.dtype = dtype
        self.w_in = init_matrix(
            rngs,
            (num_experts, d_model, parts, d_hidden),
            axes=("experts", "embed", "parts", "hidden"),
            std=d_model**-0.5,
        )
        self.w_out = init_matrix(
            rngs,
            (num_experts, d_hidden, d_model),
            axes=("experts", "hidden", "embed"),
            std=out_scale * d_hidden**-0.5,
        )

        def zeros(*shape: int, axes: tuple[str, ...]) -> nnx.Param | None:
            return (
                nnx.Param(jnp.zeros((num_experts, *shape), jnp.float32), axes=("experts", *axes))
                if bias
                else None
            )

        self.b_in = zeros(parts, d_hidden, axes=("parts", "hidden"))
        self.b_out = zeros(d_model, axes=("embed",))

    @checked(plan=instance_of(DispatchPlan, "a DispatchPlan, as make_plan returns it"))
    def __call__(self, x_TD: jax.Array, plan: DispatchPlan, weights_TK: jax.Array) -> jax.Array:
        """Sum over a token's choices of weight * expert(x): [T, D]."""
        D = self.w_in.shape[1]
        require(x_TD.shape[1] == D, "x_TD", x_TD, f"must be [T, {D}], as wide as the experts' d_model")
        sizes_P = plan.group_sizes_P
        require_shape("plan.group_sizes_P", sizes_P, self.w_in.shape[:1], "one for each of these experts")
        w_in_EDH = self.w_in[...].reshape(*self.w_in.shape[:2], -1).astype(self.dtype)
        w_out_EFD = self.w_out[...].astype(self.dtype)
        x_TD = x_TD.astype(self.dtype)
        activation = ACTIVATIONS[self.activation]
        if self.b_in is None or self.b_out is None:
            return expert_ffn(activation, x_TD, plan, weights_TK, w_in_EDH, w_out_EFD)
        b_in_EH = self.b_in[...].reshape(w_in_EDH.shape[0], -1)
        rows_ND, sizes = permute(x_TD, plan), plan.group_sizes_P
        hidden_NH = grouped_matmul(rows_ND, w_in_EDH, sizes) + bias_of_rows(rows_ND, b_in_EH, sizes)
        hidden_NH = checkpoint_name(hidden_NH, GROUPED_PRODUCT)  # the sum is kept, and not its two terms
        a_NF = activation.function(hidden_NH)
        b_out_ED = self.b_out[...]
        if (
            parts := tensor_axes()
        ):  # the results of the devices along it are summed: one of them adds the bias
            b_out_ED = jnp.where(jax.lax.axis_index(parts) == 0, b_out_ED, 0)
        y_ND = grouped_matmul(a_NF, w_out_EFD, sizes) + bias_of_rows(rows_ND, b_out_ED, sizes)
        return unpermute(checkpoint_name(y_ND, GROUPED_PRODUCT), plan, weights_TK)


def bias_of_rows(rows_ND: jax.Array, b_EH: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """[N, H]: the bias of each row's expert, of the rows' dtype; 0 for tail rows.

    As a product with a column of ones, so that the gradient is summed by group and not scattered.
    """
    ones_N1 = jnp.ones_like(rows_ND[:, :1])
    return grouped_matmul(ones_N1, b_EH[:, None, :].astype(rows_ND.dtype), group_sizes_E)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_ffn(
    activation: Activation,
    x_TD: jax.Array,
    plan: DispatchPlan,
    weights_TK: jax.Array,
    w_in_EDH: jax.Array,
    w_out_EFD: jax.Array,
) -> jax.Array:
    """y_t = sum_k weights[t, k] * activation(x_t @ w_in[e]) @ w_out[e], with e the expert of choice k.

    One differentiable unit: backward keeps x, the plan, the weights and the pre-activation, gathers the rows a second
    time, and takes the gradient of a weight as <d activation, activation>, so that no expert's output is stored
    (SonicMoE's observation; 2TD + 2TKH bytes in bf16).
    """
    return _expert_ffn_forward(activation, x_TD, plan, weights_TK, w_in_EDH, w_out_EFD)[0]


def _expert_ffn_forward(activation, x_TD, plan, weights_TK, w_in_EDH, w_out_EFD):
    hidden_NH = grouped_matmul(permute(x_TD, plan), w_in_EDH, plan.group_sizes_P)
    y_ND = grouped_matmul(activation.of_rows(hidden_NH), w_out_EFD, plan.group_sizes_P)
    y_TD = unpermute(y_ND, plan, weights_TK)
    return y_TD, (x_TD, plan, weights_TK, w_in_EDH, w_out_EFD, hidden_NH)


def _expert_ffn_backward(activation, residuals, dy_TD):
    x_TD, plan, weights_TK, w_in_EDH, w_out_EFD, hidden_NH = residuals
    sizes = plan.group_sizes_P
    wide = jnp.promote_types(dy_TD.dtype, jnp.float32)
    weight_N = plan.choices_to_rows(weights_TK).astype(wide)

    # With dA' = dY @ w_out.T before weighting: d weight = <dA', A>, dA = weight * dA'.
    dy_ND = permute(dy_TD, plan)
    da_NF = grouped_matmul_dlhs(dy_ND, w_out_EFD, sizes).astype(wide)
    weighted_a_NF, dh_NH, d_weight_N = activation.backward_of_rows(hidden_NH, da_NF, weight_N)
    dw_out_EFD = grouped_matmul_drhs(weighted_a_NF, dy_ND, sizes)

    dw_in_EDH = grouped_matmul_drhs(permute(x_TD, plan), dh_NH, sizes)
    dx_TD = unpermute(grouped_matmul_dlhs(dh_NH, w_in_EDH, sizes), plan)
    d_weights_TK = plan.rows_to_choices(d_weight_N).astype(weights_TK.dtype)
    return dx_TD, None, d_weights_TK, dw_in_EDH.astype(w_in_EDH.dtype), dw_out_EFD.astype(w_out_EFD.dtype)


expert_ffn.defvjp(_expert_ffn_forward, _expert_ffn_backward)
