"""Which rows belong to which group, for rows packed by group.

Shapes: N rows, E groups.
"""

import jax
import jax.numpy as jnp


def group_bounds(sizes_E: jax.Array, N: int) -> jax.Array:
    """Group e owns rows bounds[e] to bounds[e + 1], int32 [E + 1].

    A negative size is 0, and what exceeds N in all is cut off; the sum of the sizes must be below 2**31.
    """
    ends_E = jnp.minimum(jnp.cumsum(jnp.maximum(sizes_E, 0), dtype=jnp.int32), N)
    return jnp.pad(ends_E, (1, 0))
