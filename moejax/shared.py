"""Shared experts: a dense FFN that every token passes beside the experts that it chooses.

Shapes: T tokens, D model width, F hidden width of all shared experts together.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from custom_ops.checks import require
from custom_ops.varying import vary_alike
from moejax.activations import ACTIVATIONS
from moejax.arguments import checked, one_of
from moejax.layers import FeedForward, init_matrix
from moejax.order import together


class SharedExperts(FeedForward):
    """Dense FFN (DeepSeekMoE, Dai et al. 2024, eq. 4), with `gate` times sigmoid(x @ w_gate) (Qwen2-MoE).

    Several shared experts are one FFN of their summed width. Inside `shard_map` over a tensor axis each device returns
    its part of the sum.

    Args:
      gate: weigh the result of each token by a learned sigmoid, formed in f32.
    """

    @checked(activation=one_of(ACTIVATIONS))
    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        gate: bool = False,
        activation: str = "swiglu",
        out_scale: float = 1.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            d_model, d_hidden, activation=activation, out_scale=out_scale, dtype=dtype, rngs=rngs
        )
        self.w_gate_D1 = (
            init_matrix(rngs, (d_model, 1), axes=("embed", "router"), std=d_model**-0.5) if gate else None
        )

    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """[T, D] -> [T, D]."""
        y_TD = super().__call__(x_TD)
        if self.w_gate_D1 is None:
            return y_TD
        gate_T1 = jax.nn.sigmoid(jnp.dot(x_TD.astype(jnp.float32), self.w_gate_D1[...]))
        return y_TD * gate_T1.astype(y_TD.dtype)


def make_shared_experts(
    d_model: int, d_hidden: int, count: int, shared_hidden: int | None, gate: bool, **ffn: Any
) -> SharedExperts | None:
    """The shared experts of a layer; None for a count of 0.

    Args:
      d_hidden: F of one expert.
      shared_hidden: F of all shared experts; None: count * d_hidden.
      ffn: further arguments of `FeedForward`.

    Raises:
      BadArgument: a width or gate without shared experts.
    """
    if count == 0:
        for argument, value in (("shared_hidden", shared_hidden), ("shared_gate", gate or None)):
            require(value is None, argument, value, "needs shared_experts of at least 1")
        return None
    hidden = count * d_hidden if shared_hidden is None else shared_hidden
    return SharedExperts(d_model, hidden, gate=gate, **ffn)


def beside(x_TD: jax.Array, shared: SharedExperts) -> tuple[jax.Array, SharedExperts]:
    """Tokens for the chosen and for the shared experts, and the latter.

    For use inside `shard_map`: on CPU the gradients of the shared experts are summed over devices only when the
    backward pass of what else starts from x is done, see `moejax.order`.
    """
    graphdef, state = nnx.split(shared)
    leaves, tree = jax.tree.flatten(state)
    x_TD, *leaves = together(vary_alike(x_TD, *leaves))
    return x_TD, nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
