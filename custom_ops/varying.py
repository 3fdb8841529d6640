"""What hand-written loops and gradients have to tell the type checker of `shard_map` (check_vma)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """The manual mesh axes over which any of the arrays varies; empty outside of shard_map."""
    axes: frozenset[str] = frozenset()
    for array in arrays:
        kind = jax.typeof(array)
        # jax 0.10 keeps the set inside `manual_axis_type`, other versions in `vma`.
        manual = getattr(kind, "manual_axis_type", None)
        axes |= frozenset(getattr(kind, "vma", ()) if manual is None else manual.varying)
    return axes


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Mark all arrays as varying over the union of their axes.

    An operand that is the same on every device of an axis then gets its gradient summed over that axis by the
    transpose of this cast, outside of the hand-written rules (and outside of their loops).
    """
    axes = varying_axes(*arrays)
    return tuple(_cast(array, axes) for array in arrays)


def vary_like(array: jax.Array, *examples: jax.Array) -> jax.Array:
    """Mark one array, say a loop's initial zeros, as varying over the axes of the examples too."""
    return _cast(array, varying_axes(*examples))


def result_like(shape: Sequence[int], dtype: DTypeLike, *examples: jax.Array) -> jax.ShapeDtypeStruct:
    """A kernel's result, declared as varying over the axes of the examples, as its caller has to."""
    axes = varying_axes(*examples)
    if not axes:
        return jax.ShapeDtypeStruct(shape, dtype)
    # Which argument says so differs between versions of jax; an array that varies has it in its type.
    return jax.eval_shape(lambda: lax.pcast(jnp.zeros(shape, dtype), tuple(sorted(axes)), to="varying"))


def _cast(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = axes - varying_axes(array)
    return lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array
