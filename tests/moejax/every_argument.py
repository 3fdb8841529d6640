"""What the tests of every argument share: that each is on in some case, and values with every gradient."""

import contextlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import moejax
from moejax.order import after
from tests import tolerance


def arguments_of(function) -> dict[str, object]:
    """Every argument but self, with its default; of `**options`, nothing."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return {p.name: () if p.kind is p.VAR_KEYWORD else p.default for p in parameters}


def assert_all_on(function, given: list[dict[str, object]]) -> None:
    """Each argument has another value than its default in one of the dicts."""
    known = arguments_of(function)
    on = {name for one in given for name, value in one.items() if name in known and value is not known[name]}
    assert on == set(known), (
        f"{len(on)} of {len(known)} arguments have a case: {sorted(set(known) - on)} has none"
    )


def on_mesh(axes):
    if not axes:
        return contextlib.nullcontext()
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    return jax.set_mesh(moejax.make_mesh(**axes, devices=devices))


def value_and_grads(function, layer, x, dy):
    """What `function(layer, x)` returns, and the gradients of sum(y * dy) + aux by all parameters and x."""
    graphdef, params, others = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(params, others, x):
        def scalar(params, x):
            y, aux, more = function(nnx.merge(graphdef, params, others), x)
            total = jnp.sum(y * dy)
            return after(total, total) + aux, (y, aux, more)

        return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(params, x)

    (_, results), (grads, dx) = run(params, others, x)
    return results, {"parameters": nnx.to_pure_dict(grads), "x": dx}


def assert_same(actual, expected, tol):
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for (path, b), a in zip(paths, jax.tree.leaves(actual), strict=True):
        tolerance.assert_close(a, b, tol, jax.tree_util.keystr(path))
