"""What the devices of this run do, measured: the constants of the estimates in `moejax.cost`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.cost import Link, Rates

# Bytes that a device sends in the small and in the large all-to-all; their difference tells the bandwidth.
_SMALL, _LARGE = 2**12, 2**24
# All devices together send no more than this at once: CPU devices share one memory.
_MOST = 2**28
_WIDTH = 1024
_REPEATS = 5


def measure_rates(mesh: Mesh, axis: str) -> Rates:
    """Time an all-to-all of two sizes along the axis, a copy and a product; for meshes of one process."""
    devices = mesh.shape[axis]
    everywhere = P(mesh.axis_names)

    def swap(numbers: int, x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x.reshape(devices, numbers // devices), axis, 0, 0, tiled=True).reshape(-1)

    def run(numbers: int) -> float:
        mapped = jax.shard_map(partial(swap, numbers), mesh=mesh, in_specs=everywhere, out_specs=everywhere)
        # Each device has its part before the clock starts: or every call would first spread them from one device.
        ones = jax.jit(
            lambda: jnp.ones(mesh.size * numbers, jnp.float32), out_shardings=NamedSharding(mesh, everywhere)
        )
        return _seconds(jax.jit(mapped), ones())

    small, large = (min(size, _MOST // mesh.size) // 4 // devices * devices for size in (_SMALL, _LARGE))
    fixed, full = run(small), run(large)
    share = (devices - 1) / devices
    bandwidth = share * 4 * (large - small) / max(full - fixed, 1e-9)
    block = jnp.ones((_WIDTH, _WIDTH), jnp.float32)
    copy = _seconds(jax.jit(lambda x: x + 1), jnp.ones(_LARGE // 4, jnp.float32))
    product = _seconds(jax.jit(lambda x: x @ x), block)
    link = Link(bandwidth, fixed / (devices - 1), 2 * _LARGE / copy)
    return Rates(link, 2 * _WIDTH**3 / product)


def _seconds(function: Callable[[jax.Array], jax.Array], argument: jax.Array) -> float:
    jax.block_until_ready(function(argument))
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(argument))
        times.append(time.perf_counter() - began)
    return min(times)
