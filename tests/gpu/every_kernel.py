"""Runs every kernel for GPUs on odd sizes, for compute-sanitizer to watch.

Op by op, not as one program: what one op hands to the next inside of a program lies in one allocation with everything
else, where a sanitizer cannot see that an access leaves its buffer.
"""

import jax
import jax.numpy as jnp
import numpy as np

from custom_ops import grouped_matmul, make_plan, permute, unpermute


def move_rows(draw: np.random.Generator, dtype, D: int, bucket_rows: int | None, unique: bool) -> None:
    dest = jnp.asarray(draw.integers(-2, 8, (131, 9)), jnp.int32)
    plan = make_plan(dest, 7, bucket_rows, unique=unique)
    x = jnp.asarray(draw.standard_normal((131, D)), dtype)
    weights = jnp.asarray(draw.standard_normal((131, 9)), jnp.float32)
    for factors in (None, weights):
        rows, pullback = jax.vjp(lambda x, f=factors: permute(x, plan, f), x)
        jax.block_until_ready(pullback(rows))
    y, pullback = jax.vjp(lambda rows, weights: unpermute(rows, plan, weights), rows, weights)
    jax.block_until_ready(pullback(y))


def multiply(draw: np.random.Generator, dtype, D: int, F: int) -> None:
    sizes = jnp.asarray([0, 130, 1, 0, 67], jnp.int32)
    rows, w = (jnp.asarray(draw.standard_normal(shape), dtype) for shape in ((211, D), (5, D, F)))
    out, pullback = jax.vjp(lambda rows, w: grouped_matmul(rows, w, sizes), rows, w)
    jax.block_until_ready(pullback(out))


def main() -> None:
    draw = np.random.default_rng(1)
    for dtype, D in ((jnp.float32, 7), (jnp.bfloat16, 100), (jnp.bfloat16, 1536)):
        for bucket_rows, unique in ((None, False), (5, True)):
            move_rows(draw, dtype, D, bucket_rows, unique)
    # On Hopper the last are Mosaic's, all others Triton's.
    for dtype, D, F in ((jnp.float32, 7, 5), (jnp.bfloat16, 100, 37), (jnp.bfloat16, 256, 128)):
        multiply(draw, dtype, D, F)


if __name__ == "__main__":
    main()
