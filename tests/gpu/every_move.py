"""Runs every CUDA kernel on odd sizes, for compute-sanitizer to watch."""

import jax
import jax.numpy as jnp
import numpy as np

from custom_ops import make_plan, permute, unpermute


def main() -> None:
    draw = np.random.default_rng(1)
    for dtype, D in ((jnp.float32, 7), (jnp.bfloat16, 100), (jnp.bfloat16, 1536)):
        for bucket_rows, unique in ((None, False), (5, True)):

            def loss(x, weights, bucket_rows=bucket_rows, unique=unique):
                dest = jnp.asarray(draw.integers(-2, 8, (131, 9)), jnp.int32)
                plan = make_plan(dest, 7, bucket_rows, unique=unique)
                return jnp.sum(unpermute(permute(x, plan), plan, weights).astype(jnp.float32))

            x = jnp.asarray(draw.standard_normal((131, D)), dtype)
            weights = jnp.asarray(draw.standard_normal((131, 9)), jnp.float32)
            jax.block_until_ready(jax.jit(jax.value_and_grad(loss, (0, 1)))(x, weights))


if __name__ == "__main__":
    main()
