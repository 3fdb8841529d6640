"""Shadows: the experts in most demand are copied to every device, and their tokens stay at home.

Shapes: T tokens on this device, D model width, E experts in all, K experts per token, S hot experts, L experts here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from custom_ops import make_plan
from custom_ops.checks import array, require_shape, whole
from custom_ops.varying import vary_alike
from moejax.dispatch import ExpertsFn
from moejax.losses import expert_load
from moejax.mesh import make_varying
from moejax.order import together
from moejax.rounds import hoist


@dataclass(frozen=True)
class Shadow:
    """How many experts are shadowed, and how.

    Fields:
      count: S.
      copy: from the numbers hot_S of the hot experts to their function; see `replicate`.
      demand_E: running estimate of the choices per expert, the same on all devices; the experts copied are those it
        is largest for. None, or without any demand: those most chosen in this batch.
    """

    count: int
    copy: Callable[[jax.Array], ExpertsFn]
    demand_E: jax.Array | None = None

    def check(self, num_experts: int) -> None:
        """Refuse what does not fit so many experts.

        Raises:
          ValueError: names the field, as one of `shadow`.
        """
        whole(1, num_experts)("shadow.count", self.count)
        if self.demand_E is not None:
            array("[E]")("shadow.demand_E", self.demand_E)
            require_shape("shadow.demand_E", self.demand_E, (num_experts,), "one for each expert")


def serve_hot(
    x_TD: jax.Array,
    ids_TK: jax.Array,
    weights_TK: jax.Array,
    shadow: Shadow,
    *,
    num_experts: int,
    axes: Sequence[str],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the S experts in most demand contribute to y_TD; served_TK; x_TD.

    Room is for S different hot experts per token; what repeats an expert beyond that is left to the usual way, which
    must start from the x_TD returned: then the copies are made before it, and their gradients are summed after its own.
    """
    load_E = expert_load(ids_TK, num_experts, axes).astype(jnp.float32)
    if shadow.demand_E is not None:
        load_E = jnp.where(jnp.any(shadow.demand_E > 0), shadow.demand_E, load_E)
    _, hot_S = jax.lax.top_k(load_E, shadow.count)
    is_slot_TKS = ids_TK[:, :, None] == hot_S[None, None, :]
    slot_TK = jnp.where(jnp.any(is_slot_TKS, axis=-1), jnp.argmax(is_slot_TKS, axis=-1), -1)
    plan = make_plan(slot_TK, shadow.count)
    plan = plan.at_most(ids_TK.shape[0] * min(shadow.count, ids_TK.shape[1]))
    (serve,), copies = hoist([shadow.copy(hot_S)], x_TD, plan, weights_TK)
    x_TD, *copies = together(vary_alike(x_TD, *copies))
    return serve(copies, x_TD, plan, weights_TK), plan.served_TK, x_TD


def replicate(w_L: jax.Array, hot_S: jax.Array, axes: Sequence[str]) -> jax.Array:
    """From each device's own experts [L, ...] the hot ones [S, ...] of all; their gradient reaches the owner."""
    if not axes:
        return w_L[hot_S]
    local_S = hot_S - jax.lax.axis_index(tuple(axes)) * w_L.shape[0]
    is_mine_S = (local_S >= 0) & (local_S < w_L.shape[0])
    own_S = w_L[jnp.clip(local_S, 0, w_L.shape[0] - 1)]
    own_S = jnp.where(is_mine_S.reshape(-1, *(1,) * (w_L.ndim - 1)), own_S, 0)
    # The same everywhere, but used with each device's own tokens: the cast's transpose sums the gradients.
    return make_varying(jax.lax.psum(own_S, tuple(axes)), axes)


def replicate_module(experts: nnx.Module, hot_S: jax.Array, axes: Sequence[str]) -> Any:
    """The module with the hot experts in place of its own, in all parameters stacked over the axis "experts"."""
    graphdef, state = nnx.split(experts)

    def of(variable: nnx.Variable) -> nnx.Variable:
        if "experts" not in variable.get_metadata("axes", ()):
            return variable
        return variable.replace(replicate(variable.get_value(), hot_S, axes))

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(of, state, is_leaf=is_variable))
