"""Static checks of arguments: every refusal names the argument, what was expected and what came."""

import jax
import jax.numpy as jnp

# Positions are int32, here and in every kernel.
MAX_ELEMENTS = 2**31


def require(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise ValueError naming the argument unless the condition holds."""
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {got}")


def require_array(argument: str, array: jax.Array, shape_rule: str, *, kind=None) -> None:
    """Check rank (one letter per dimension in `shape_rule`, such as "[T, D]"), dtype and size."""
    rank = shape_rule.count(",") + 1
    shape = tuple(jnp.shape(array))
    require(len(shape) == rank, argument, f"rank {rank} {shape_rule}", f"shape {shape}")
    if kind is not None:
        dtype = jnp.result_type(array)
        require(jnp.issubdtype(dtype, kind), argument, f"a dtype of kind {kind.__name__}", dtype)
    size = 1
    for length in shape:
        size *= length
    require(size < MAX_ELEMENTS, argument, f"fewer than 2**31 elements {shape_rule}", f"shape {shape}")
