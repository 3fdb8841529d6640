"""One compiled layer with given choices, to be run under many loads and compared with the dense oracle.

Shapes: T tokens of all devices, D model width, E experts in all, K experts per token, N rows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import moejax
from custom_ops.varying import vary_like
from moejax.functional import deliver, on_rows
from moejax.levels import CAPACITY_FACTOR
from moejax.mesh import make_varying
from moejax.shadow import Shadow, replicate

D = 8
NAMES = ("y", "d x", "d weights", "d w_EDD")


def experts(w_EDD):
    """Small experts that compile fast: tanh(x @ w[e])."""

    def rows(rows_ND, group_sizes_E):
        ends_E = jnp.cumsum(group_sizes_E)
        group_N = jnp.sum(jnp.arange(rows_ND.shape[0])[:, None] >= ends_E[None, :], axis=1)
        w_NDD = w_EDD[jnp.minimum(group_N, w_EDD.shape[0] - 1)]
        return jnp.tanh(jnp.einsum("nd,ndf->nf", rows_ND, w_NDD, precision="highest"))

    return on_rows(rows)


def draw(num_tokens, top_k, num_experts, dtype=np.float32):
    """x, weights, w and the output's cotangent."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, num_tokens, D))
    weights = rng.random((num_tokens, top_k))
    w = rng.standard_normal((num_experts, D, D)) / D**0.5
    return tuple(a.astype(dtype) for a in (x, weights, w, dy))


@functools.cache
def oracle(num_experts):
    """(x, weights, w, ids, dy) -> y and the gradients of sum(y * dy), every expert applied to every token."""

    def value(x, weights, w, ids):
        chosen_TKE = ids[:, :, None] == jnp.arange(num_experts)[None, None, :]
        scale_TE = jnp.sum(jnp.where(chosen_TKE, weights[:, :, None], 0), axis=1)
        y_TED = jnp.tanh(jnp.einsum("td,edf->tef", x, w, precision="highest"))
        return jnp.einsum("te,tef->tf", scale_TE, y_TED, precision="highest")

    return jax.jit(lambda x, weights, w, ids, dy: _value_and_grads(value, x, weights, w, ids, dy))


def _value_and_grads(value, x, weights, w, ids, dy):
    y, pull = jax.vjp(lambda x, weights, w: value(x, weights, w, ids), x, weights, w)
    return y, *pull(dy)


class Layer:
    """`layer(ids, *draw(...)) -> (y, gradients...), account` on a mesh, compiled once.

    In the account numbers of each device stand in rows.

    The weights stand in the closure of the experts, as in a user's own code. They are marked as varying over all axes,
    as `MoE` does, unless `varying` is False: then they are the same on all data groups in the eyes of jax too.
    """

    def __init__(self, mesh, num_experts, *, shadow=0, varying=True, **options):
        if options.get("overflow") != "drop":
            options.setdefault("capacity_factor", CAPACITY_FACTOR)  # on CPU as on GPUs
        axes = tuple(axis for axis in ("expert_node", "expert") if mesh.shape[axis] > 1)
        tokens = P(tuple(mesh.axis_names))

        def local(x, weights, w, ids):
            if varying:
                w = make_varying(w, mesh.axis_names)
            hot = Shadow(shadow, lambda hot_S: experts(replicate(w, hot_S, axes))) if shadow else None
            y, account = deliver(
                x,
                ids,
                weights,
                experts(w),
                num_experts=num_experts,
                axes=axes,
                token_axes=mesh.axis_names,
                shadow=hot,
                **options,
            )
            account = account._replace(
                over_capacity=account.over_capacity[None],
                at_sender=vary_like(account.at_sender, x)[None],
                rounds=vary_like(account.rounds, x)[None],
                fill_V=vary_like(account.fill_V, x)[None],
            )
            return y, jax.lax.stop_gradient(account)

        self.forward = jax.shard_map(
            local, mesh=mesh, in_specs=(tokens, tokens, P(axes), tokens), out_specs=(tokens, tokens)
        )

        def run(x, weights, w, ids, dy):
            y, pull, account = jax.vjp(lambda *a: self.forward(*a, ids), x, weights, w, has_aux=True)
            return (y, *pull(dy)), account

        self.jitted = jax.jit(run)

    def __call__(self, ids, x, weights, w, dy):
        return self.jitted(x, weights, w, jnp.asarray(ids, jnp.int32), dy)


def make_mesh(data, expert_node, expert):
    devices = jax.devices()[: data * expert_node * expert]
    return moejax.make_mesh(data=data, expert_node=expert_node, expert=expert, devices=devices)
