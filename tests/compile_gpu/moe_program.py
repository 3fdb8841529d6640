"""One MoE layer, or a stack of them in a scan, forward and backward, compiled for H200s.

Shapes: T tokens of one device, D model width, F expert hidden width, E experts, K experts per token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import moejax
from moejax.mesh import state_shardings, token_sharding
from tests.compile_gpu import h200
from train.program import compiler_options


class Sizes(NamedTuple):
    """Fields: see the shapes above."""

    T: int
    D: int
    F: int
    E: int
    K: int


def compile_moe(
    sizes: Sizes, *, count: int, nodes: int = 1, depth: int | None = None, chunks: int = 1, **options
) -> h200.Program:
    """Loss and gradients by parameters and tokens, in bf16, with the options that the trainer gives the compiler.

    Args:
      count, nodes: devices in all, and the nodes they are in; the experts are split over all of them.
      depth: layers of a scan with residual connections; None: a single layer.
      options: of `moejax.MoE`.
    """
    T, D, F, E, K = sizes
    devices = h200.devices(count, nodes)
    mesh = moejax.make_mesh(expert_node=nodes, expert=count // nodes, devices=devices)
    make = lambda: moejax.MoE(  # noqa: E731
        D, F, E, top_k=K, chunks=chunks, dtype=jnp.bfloat16, rngs=nnx.Rngs(0), **options
    )
    graphdef, state = nnx.split(nnx.eval_shape(make))
    stacked = () if depth is None else (depth,)
    shape = lambda s: jax.ShapeDtypeStruct((*stacked, *s.shape), s.dtype)  # noqa: E731
    place = lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at)  # noqa: E731
    state = jax.tree.map(shape, state)
    params = jax.tree.map(place, state, state_shardings(state, mesh))
    tokens = jax.ShapeDtypeStruct((count * T, D), jnp.bfloat16, sharding=token_sharding(mesh))

    def loss(params, x_TD):
        def layer(x_TD, params):
            y_TD, stats = nnx.merge(graphdef, params)(x_TD)
            return x_TD + y_TD, stats.aux_loss

        y_TD, aux_losses = layer(x_TD, params) if depth is None else jax.lax.scan(layer, x_TD, params)
        # Not linear: backward needs what forward gives, as in a model.
        return jnp.mean(jnp.square(y_TD.astype(jnp.float32))) + jnp.sum(aux_losses)

    step = jax.jit(
        jax.value_and_grad(loss, (0, 1)),
        out_shardings=(None, (jax.tree.map(lambda p: p.sharding, params), tokens.sharding)),
        compiler_options=compiler_options(mesh, chunks),
    )
    with jax.set_mesh(mesh):
        return h200.compile_for(devices[0], step, params, tokens)
