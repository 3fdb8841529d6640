"""A tree of arrays as a flat dictionary of dotted names: what a checkpoint stores and compares.

Names do not depend on the container types, so that a part of a state can be restored by somebody who does
not know the rest, and a difference can be told by name.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by dotted path, in the tree's order, such as `params.blocks.0.w`."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same dotted path")
    return named


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key, which is stored as its numbers."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored(leaf: jax.Array) -> jax.Array:
    """The plain array that a checkpoint holds for a leaf."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def stored_abstract(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding with which the plain array of a leaf is read."""
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    plain = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=sharding)


def bytes_of(tree: Any) -> int:
    """Bytes of all plain arrays of a tree of `jax.ShapeDtypeStruct`."""
    plain = map(stored_abstract, jax.tree.leaves(tree))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in plain)


def revived(leaf: jax.ShapeDtypeStruct, array: jax.Array) -> jax.Array:
    """The leaf made of its plain array: the inverse of `stored`."""
    return jax.random.wrap_key_data(array, impl=_implementation(leaf)) if is_key(leaf) else array


def _implementation(leaf: jax.ShapeDtypeStruct) -> str:
    """Name of a typed random key's generator; jax tells it of keys only, so a trace stands in for one."""
    names: list[str] = []
    jax.eval_shape(lambda key: names.append(str(jax.random.key_impl(key))), leaf)
    return names[0]


def description(leaves: dict[str, Any]) -> dict[str, str]:
    """Each leaf as text, such as `float32[8,128]`."""
    return {name: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for name, leaf in leaves.items()}


def difference(saved: dict[str, str], wanted: dict[str, str], limit: int = 4) -> str | None:
    """One line that names the leaves in which two descriptions differ, or None."""
    parts = [
        f"{name} is {saved[name]} there, {wanted[name]} here"
        for name in saved.keys() & wanted.keys()
        if saved[name] != wanted[name]
    ]
    parts += [f"{name} is only there" for name in saved.keys() - wanted.keys()]
    parts += [f"{name} is only here" for name in wanted.keys() - saved.keys()]
    if not parts:
        return None
    parts.sort()
    return "; ".join(parts[:limit]) + (f"; and {len(parts) - limit} more" if len(parts) > limit else "")
