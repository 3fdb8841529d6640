"""Activations between the two products of an FFN, dense or of experts: the one table of their names.

Shapes: N rows, F hidden width, H columns before the activation: F, or 2F for a gated one (the gate's F, then those
that it gates).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from custom_ops import reference, swiglu, swiglu_backward
from moejax.normal import normal_cdf

# Rows of experts: (hidden_NH, da_NF, weight_N) -> (weight * a_NF, dh_NH, d_weight_N = <da, a>).
Backward = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


@dataclass(frozen=True)
class Activation:
    """One activation.

    Fields:
      function: [..., H] -> [..., F], in plain XLA, which a compiler that splits dense layers over devices can split.
      columns: H / F, 2 for a gated activation, otherwise 1.
      of_rows: `function` for the sorted rows of experts, [N, H] -> [N, F].
      backward_of_rows: what the backward pass of experts needs; see `custom_ops.swiglu_backward`.
    """

    function: Callable[[jax.Array], jax.Array]
    columns: int
    of_rows: Callable[[jax.Array], jax.Array]
    backward_of_rows: Backward


def relu2(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (So et al. 2021, Primer)."""
    return jnp.square(jax.nn.relu(x))


def gelu(x: jax.Array) -> jax.Array:
    """GELU by its tanh approximation (Hendrycks & Gimpel 2016, section 2; GPT-2, Gemma)."""
    return jax.nn.gelu(x, approximate=True)


def gelu_exact(x: jax.Array) -> jax.Array:
    """x * Phi(x), with the normal distribution's own Phi (Hendrycks & Gimpel 2016; BERT)."""
    if x.dtype == jnp.float64:
        return jax.nn.gelu(x, approximate=False)
    return (x * normal_cdf(x.astype(jnp.float32))).astype(x.dtype)


# GPT-OSS's slope of the sigmoid, and where it clamps.
_SLOPE, _LIMIT = 1.702, 7.0


def clamped_swiglu(hidden: jax.Array) -> jax.Array:
    """gate * sigmoid(1.702 gate) * (up + 1), with gate at most 7 and up between -7 and 7 (GPT-OSS).

    The gradient is 0 beyond the limits, and whole at them.
    """
    gate, up = jnp.split(hidden, 2, axis=-1)
    gate = jnp.where(gate > _LIMIT, _LIMIT, gate)
    up = jnp.where(jnp.abs(up) > _LIMIT, _LIMIT * jnp.sign(up), up)
    return gate * jax.nn.sigmoid(_SLOPE * gate) * (up + 1)


def _gated(gate_function: Callable[[jax.Array], jax.Array], hidden: jax.Array) -> jax.Array:
    """gate_function(gate) * up (Shazeer 2020, eq. 5-6)."""
    gate, up = jnp.split(hidden, 2, axis=-1)
    return gate_function(gate) * up


def _backward(function, hidden_NH, da_NF, weight_N):
    a_NF, vjp = jax.vjp(function, hidden_NH)
    d_weight_N = jnp.sum(da_NF * a_NF.astype(da_NF.dtype), axis=-1)
    (dh_NH,) = vjp((da_NF * weight_N[:, None]).astype(a_NF.dtype))
    return (a_NF * weight_N[:, None]).astype(a_NF.dtype), dh_NH, d_weight_N


def _plain(function: Callable[[jax.Array], jax.Array], columns: int = 1) -> Activation:
    return Activation(function, columns, function, partial(_backward, function))


# Backward keeps what goes into an activation and computes its inner steps again: cheaper than to store them.
ACTIVATIONS: dict[str, Activation] = {
    "swiglu": Activation(reference.swiglu, 2, swiglu, swiglu_backward),
    "gelu": _plain(gelu),
    "gelu_exact": _plain(gelu_exact),
    "relu": _plain(jax.nn.relu),
    "relu2": _plain(relu2),
    "geglu": _plain(partial(_gated, gelu), 2),
    "reglu": _plain(partial(_gated, jax.nn.relu), 2),
    "clamped_swiglu": _plain(clamped_swiglu, 2),
}
