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
    shared = {axis for array in captured for axis in varying_axes(x_TD) - varying_axes(array)}
    rule = _Rounds(first, again, tuple(sorted({*axes, *shared})))
    return _run(rule, captured, x_TD, weights_TK, ids_TK)


class _Rounds(NamedTuple):
    """Both passes, as functions of (captured, x, weights, ids), and the axes that must agree on going on."""

    first: Callable[..., tuple[jax.Array, jax.Array, Any]]
    again: Callable[..., tuple[jax.Array, jax.Array, Any]]
    axes: tuple[str, ...]

    def is_any_left(self, ids_TK: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.any(ids_TK >= 0).astype(jnp.int32), self.axes) > 0


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(rule: _Rounds, captured, x_TD, weights_TK, ids_TK):
    return _run_forward(rule, captured, x_TD, weights_TK, ids_TK)[0]


def _run_forward(rule: _Rounds, captured, x_TD, weights_TK, ids_TK):
    first = partial(_with_ids, rule.first, ids_TK)
    y_TD, pull, (served_TK, facts) = jax.vjp(first, captured, x_TD, weights_TK, has_aux=True)
    first_left_TK = jnp.where(served_TK, -1, ids_TK)
    first_left_TK, is_any_left = account((first_left_TK, rule.is_any_left(first_left_TK)))

    def one_more(carry):
        y_TD, left_TK, _, rounds = carry
        more_TD, served_TK, _ = rule.again(captured, x_TD, weights_TK, left_TK)
        left_TK = jnp.where(served_TK, -1, left_TK)
        return y_TD + more_TD, left_TK, rule.is_any_left(left_TK), rounds + 1

    start = (y_TD, first_left_TK, is_any_left, vary_like(jnp.int32(1), x_TD))
    y_TD, left_TK, _, rounds = jax.lax.while_loop(lambda carry: carry[2], one_more, start)
    rounds = account(rounds)
    saved = (pull, captured, x_TD, weights_TK, first_left_TK, is_any_left, rounds)
    return (y_TD, left_TK, rounds, facts), saved


def _run_backward(rule: _Rounds, saved, cotangents):
    pull, captured, x_TD, weights_TK, left_TK, is_any_left, rounds = saved
    # Under a linear loss nothing else would keep the forward loop and what follows apart.
    dy_TD = waiting(cotangents[0], rounds)
    operands = (captured, x_TD, weights_TK)

    def one_more(carry):
        grads, left_TK, _ = carry
        again = partial(_with_ids, rule.again, left_TK)
        _, pull, (served_TK, _) = jax.vjp(again, *operands, has_aux=True)
        grads = jax.tree.map(lambda total, part: total + part.astype(total.dtype), grads, pull(dy_TD))
        left_TK = jnp.where(served_TK, -1, left_TK)
        return grads, left_TK, rule.is_any_left(left_TK)

    # The sum begins with the gradients of the first pass, and is formed in at least f32.
    grads = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), pull(dy_TD))
    grads, *_ = jax.lax.while_loop(lambda carry: carry[2], one_more, (grads, left_TK, is_any_left))
    return (*jax.tree.map(lambda g, of: g.astype(of.dtype), grads, operands), None)


_run.defvjp(_run_forward, _run_backward)


def _with_ids(function, ids_TK, captured, x_TD, weights_TK):
    y_TD, served_TK, facts = function(captured, x_TD, weights_TK, ids_TK)
    return y_TD, (served_TK, facts)


def hoist(
    functions: Sequence[Callable[..., Any]], *examples: Any
) -> tuple[list[Callable[..., Any]], list[jax.Array]]:
    """What the functions close over and are differentiated by, as one list that each takes as first argument."""
    captured: list[jax.Array] = []

    def convert(function: Callable[..., Any]) -> Callable[..., Any]:
        converted, constants = jax.closure_convert(function, *examples)
        known = {id(array): index for index, array in enumerate(captured)}
        captured.extend(array for array in constants if id(array) not in known)
        known = {id(array): index for index, array in enumerate(captured)}
        places = [known[id(array)] for array in constants]
        return lambda arrays, *args: converted(*args, *(arrays[place] for place in places))

    return [convert(function) for function in functions], captured
