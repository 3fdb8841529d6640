"""Records of the right type whose fields have the wrong size or kind; what each function makes starts from a right one.

Shapes: E experts, M layers, B sequences, S positions, G key/value heads, h width of a head.
"""

import dataclasses

import jax.numpy as jnp

import moejax
from moejax.cost import Link
from moejax.shadow import Shadow


def replaced(right, **values):
    """The record once for each of the values, given by field."""
    return [dataclasses.replace(right, **{field: bad}) for field, given in values.items() for bad in given]


def batch_load(num_experts, *layers):
    return moejax.BatchLoad(jnp.ones((*layers, num_experts)), 8 * jnp.ones(layers), 2 * jnp.ones(layers))


def batch_loads(num_experts, *layers):
    sizes = [(), (1,), (num_experts - 1,), (num_experts + 1,), (1, 1), (num_experts, 1), (1, num_experts + 1)]
    counts = [None, "x", [1.0] * num_experts, *(jnp.ones(size) for size in sizes), jnp.ones((2, num_experts))]
    single = [None, "8", True, [8.0], jnp.ones((1, 1)), jnp.ones(2), jnp.ones(num_experts)]
    return replaced(batch_load(num_experts, *layers), counted_E=counts, tokens=single, parts=single)


def caches(*layers, B, S, G, h):
    shape = *layers, B, S, G, h
    right = moejax.KVCache(jnp.ones(shape), jnp.ones(shape), jnp.zeros((*layers, S), jnp.int32))
    shapes = [(*layers, 1, S, G, h), (*layers, B, S, 1, h), (*layers, B, S, G, 1), (*layers, B, S + 1, G, h)]
    arrays = [None, 3, jnp.ones((1, *shape)), right.k_BWGh.astype(jnp.int32), *map(jnp.ones, shapes)]
    arrays += [jnp.ones((layer + 1, B, S, G, h)) for layer in layers]
    slots = [None, 3, jnp.ones((*layers, S)), right.position_W[..., :1], right.position_W[None]]
    short = right.k_BWGh[..., : S - 1, :, :]
    too_short = moejax.KVCache(short, short, right.position_W[..., : S - 1])
    return [*replaced(right, k_BWGh=arrays, v_BWGh=arrays, position_W=slots), too_short]


def links():
    link = Link(1.0, 1.0, 1.0)
    return [{1: link}, {"exprt": link}, {"expert": link, "data": link}, {"expert": 3}]


def shadows(num_experts):
    demands = [1.0, jnp.ones(1), jnp.ones(num_experts + 1), jnp.ones((1, num_experts))]
    counts = [0, -1, num_experts + 1, 1.0, None]
    return replaced(Shadow(1, lambda hot_S: None), count=counts, demand_E=demands)
