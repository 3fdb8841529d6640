"""Experts that differ from each other: a list of modules, each with parameters and a structure of its own.

Shapes: T tokens, D model width, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from custom_ops import DispatchPlan
from custom_ops.checks import require
from moejax.arguments import checked, takes
from moejax.mesh import expert_axes
from moejax.own import check_axes


class ExpertList(nnx.Module):
    """Different experts, each a module `expert(x_TD) -> y_TD` that treats tokens one by one.

    Every expert runs on all tokens and its result counts where it was chosen, since the sizes of arrays cannot depend
    on the choices: E / K times the work of chosen experts alone. One program runs on all devices, so they cannot be
    split over expert axes; over `data` they can be used as they are.

    Raises:
      ValueError: there are not `num_experts` of them, one occurs twice, or a parameter's `axes` are not those of its
        dimensions.
    """

    @checked()
    def __init__(self, experts: Sequence[nnx.Module], num_experts: int):
        is_list = isinstance(experts, (Sequence, nnx.List)) and not isinstance(experts, str)
        rule = (
            f"must be the name of an activation, a module, or a list of num_experts ({num_experts}) modules"
        )
        require(is_list, "experts", experts, rule)
        for number, expert in enumerate(experts):
            rule = "must be a module that can be called, expert(x_TD) -> y_TD"
            require(takes(expert, 1), f"experts[{number}]", expert, rule)
        rule = f"must be num_experts ({num_experts}) modules, got {len(experts)}"
        require(len(experts) == num_experts, "experts", experts, rule)
        rule = "must be different modules; one that occurs twice would be one expert with two numbers"
        require(len({id(expert) for expert in experts}) == num_experts, "experts", experts, rule)
        self.experts = nnx.List(experts)
        check_axes("experts", self.experts)

    def __call__(self, x_TD: jax.Array, plan: DispatchPlan, weights_TK: jax.Array) -> jax.Array:
        """Sum over a token's choices of weight * expert(x): [T, D].

        Raises:
          ValueError: the mesh has an expert axis, or an expert returns another shape than it got.
        """
        if axes := expert_axes():
            raise ValueError(
                f"experts = a list: different experts cannot be split over mesh axis {axes[0]!r}, since all devices "
                "run one program; leave it at 1 and use the axis 'data', or stack experts of one shape in one module"
            )
        ends_E = jnp.cumsum(plan.group_sizes_P)
        expert_TK = jnp.sum(plan.position_TK[:, :, None] >= ends_E[None, None, :], axis=-1)
        filler_D = (1 - 2 * (jnp.arange(x_TD.shape[1]) % 2)).astype(x_TD.dtype)
        y_TD = jnp.zeros_like(x_TD)
        for number, expert in enumerate(self.experts):
            chosen_TK = (expert_TK == number) & (plan.position_TK >= 0)
            weight_T = jnp.sum(jnp.where(chosen_TK, weights_TK, 0), axis=1)
            # Tokens that did not choose it are replaced by numbers of mean 0 and variance 1, finite through any norm.
            is_own_T1 = jnp.any(chosen_TK, axis=1)[:, None]
            own_TD = jnp.where(is_own_T1, x_TD, filler_D[None, :])
            result_TD = expert(own_TD)
            if result_TD.shape != x_TD.shape:
                raise ValueError(
                    f"experts[{number}] returned shape {result_TD.shape}: must be that of its input, {x_TD.shape}"
                )
            y_TD += jnp.where(is_own_T1, weight_T[:, None] * result_TD, 0).astype(y_TD.dtype)
        return y_TD
