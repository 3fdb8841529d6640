"""Rounds: a layer is run again on the choices for which a static buffer had no room, until none is left.

Exact under any imbalance, in fixed memory, with one loop in the forward and one in the backward program.

Shapes: T tokens on this device, D model width, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from custom_ops.varying import vary_alike, vary_like, varying_axes
from moejax.kept import account
from moejax.order import waiting

# (x_TD, weights_TK, ids_TK) -> (y_TD, served_TK, further facts)
Pass = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, Any]]


def in_rounds(
    first: Pass, again: Pass, x_TD: jax.Array, weights_TK: jax.Array, ids_TK: jax.Array, axes: Sequence[str]
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """Repeat a layer on the choices it has not served yet, until none is left; its outputs add up.

    `first` is the normal, straight-line pass; `again` its repetition in a loop that balanced load never enters.
    Backward replays the same rounds. Each pass must serve at least one of the choices left on the axes.

    Args:
      first, again: may close over parameters and are differentiated by them too.
      axes: mesh axes whose devices pass rows to each other: they take equally many rounds, others need not.

    Returns:
      y_TD; the choices left, -1 for all that were carried out; the number of rounds, i32; the first pass's further
      facts.
    """
    x_TD, weights_TK, ids_TK = vary_alike(x_TD, weights_TK, ids_TK)
    (first, again), captured = hoist([first, again], x_TD, weights_TK, ids_TK)
    # The gradient of a captured array that is the same along an axis is summed along that axis, within the loop; then
    # the devices of that axis must take equally many rounds too, or they would wait for each other forever.
    is_real = [jnp.issubdtype(array.dtype, jnp.inexact) for array in captured]
    real = [array for array, has_gradient in zip(captured, is_real, strict=True) if has_gradient]
    fixed = [array for array, has_gradient in zip(captured, is_real, strict=True) if not has_gradient]
    shared = {axis for array in real for axis in varying_axes(x_TD) - varying_axes(array)}
    first, again = (partial(_joined, tuple(is_real), function) for function in (first, again))
    rule = _Rounds(first, again, tuple(sorted({*axes, *shared})))
    return _run(rule, real, x_TD, weights_TK, (ids_TK, fixed))


class _Rounds(NamedTuple):
    """Both passes, as functions of (captured, x, weights, (ids, fixed)), and the axes that must agree on going on.

    Fixed is what the passes close over that has no gradient: integers, keys.
    """

    first: Callable[..., tuple[jax.Array, jax.Array, Any]]
    again: Callable[..., tuple[jax.Array, jax.Array, Any]]
    axes: tuple[str, ...]

    def is_any_left(self, ids_TK: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.any(ids_TK >= 0).astype(jnp.int32), self.axes) > 0


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(rule: _Rounds, captured, x_TD, weights_TK, choices):
    return _run_forward(rule, captured, x_TD, weights_TK, choices)[0]


def _run_forward(rule: _Rounds, captured, x_TD, weights_TK, choices):
    ids_TK, fixed = choices
    first = partial(_with_ids, rule.first, choices)
    y_TD, pull, (served_TK, facts) = jax.vjp(first, captured, x_TD, weights_TK, has_aux=True)
    first_left_TK = jnp.where(served_TK, -1, ids_TK)
    first_left_TK, is_any_left = account((first_left_TK, rule.is_any_left(first_left_TK)))

    def one_more(carry):
        y_TD, left_TK, _, rounds = carry
        more_TD, served_TK, _ = rule.again(captured, x_TD, weights_TK, (left_TK, fixed))
        left_TK = jnp.where(served_TK, -1, left_TK)
        return y_TD + more_TD, left_TK, rule.is_any_left(left_TK), rounds + 1

    start = (y_TD, first_left_TK, is_any_left, vary_like(jnp.int32(1), x_TD))
    y_TD, left_TK, _, rounds = jax.lax.while_loop(lambda carry: carry[2], one_more, start)
    rounds = account(rounds)
    saved = (pull, captured, x_TD, weights_TK, (first_left_TK, fixed), is_any_left, rounds)
    return (y_TD, left_TK, rounds, facts), saved


def _run_backward(rule: _Rounds, saved, cotangents):
    pull, captured, x_TD, weights_TK, (left_TK, fixed), is_any_left, rounds = saved
    # Under a linear loss nothing else would keep the forward loop and what follows apart.
    dy_TD = waiting(cotangents[0], rounds)
    operands = (captured, x_TD, weights_TK)

    def one_more(carry):
        grads, left_TK, _ = carry
        again = partial(_with_ids, rule.again, (left_TK, fixed))
        _, pull, (served_TK, _) = jax.vjp(again, *operands, has_aux=True)
        grads = jax.tree.map(lambda total, part: total + part.astype(total.dtype), grads, pull(dy_TD))
        left_TK = jnp.where(served_TK, -1, left_TK)
        return grads, left_TK, rule.is_any_left(left_TK)

    # The sum begins with the gradients of the first pass, and is formed in at least f32.
    grads = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), pull(dy_TD))
    grads, *_ = jax.lax.while_loop(lambda carry: carry[2], one_more, (grads, left_TK, is_any_left))
    return (*jax.tree.map(lambda g, of: g.astype(of.dtype), grads, operands), None)


_run.defvjp(_run_forward, _run_backward)


def _joined(is_real, function, real, x_TD, weights_TK, choices):
    ids_TK, fixed = choices
    reals, others = iter(real), iter(fixed)
    captured = [next(reals if has_gradient else others) for has_gradient in is_real]
    return function(captured, x_TD, weights_TK, ids_TK)


def _with_ids(function, choices, captured, x_TD, weights_TK):
    y_TD, served_TK, facts = function(captured, x_TD, weights_TK, choices)
    return y_TD, (served_TK, facts)


def hoist(
    functions: Sequence[Callable[..., Any]], *examples: Any
) -> tuple[list[Callable[..., Any]], list[jax.Array]]:
    """What is traced and the functions close over, of any dtype, as one list that each takes as first argument.

    Arrays with a value of their own stay inside: a differentiation rule may close over them, and they have no gradient.
    """
    captured: list[jax.Array] = []

    def convert(function: Callable[..., Any]) -> Callable[..., Any]:
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*examples)
        out_tree = jax.tree.structure(shapes)
        is_traced = [isinstance(constant, jax.core.Tracer) for constant in closed.consts]
        known = {id(array): index for index, array in enumerate(captured)}
        for array, traced in zip(closed.consts, is_traced, strict=True):
            if traced and id(array) not in known:
                known[id(array)] = len(captured)
                captured.append(array)
        places = [
            known[id(array)] if traced else None
            for array, traced in zip(closed.consts, is_traced, strict=True)
        ]
        own = [None if traced else array for array, traced in zip(closed.consts, is_traced, strict=True)]

        def converted(arrays: Sequence[jax.Array], *args: Any) -> Any:
            constants = [
                array if place is None else arrays[place] for place, array in zip(places, own, strict=True)
            ]
            outputs = jax.core.eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves(args))
            return jax.tree.unflatten(out_tree, outputs)

        return converted

    return [convert(function) for function in functions], captured
