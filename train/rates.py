"""What the devices of this run do, measured: the constants of the estimates in `moejax.cost`."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.cost import Link, Rates
from train import processes

T = TypeVar("T")

REPEATS = 5
"""Timed runs of each call; the fastest counts."""

# Everything is timed in two sizes: what both take alike is overhead, and only their difference tells the rate.
# Bytes that a device holds of an all-to-all, and that are copied; width of a square product.
_BYTES = {"cpu": (2**12, 2**24), "gpu": (2**12, 2**29)}
_WIDTHS = {"cpu": (256, 1024), "gpu": (1024, 8192)}
# CPU devices share one memory: all together hold no more than this.
_MOST_ON_CPU = 2**28


def measure_rates(mesh: Mesh, axis: str, dtype: jax.typing.DTypeLike = jnp.float32) -> Rates:
    """Time an all-to-all along the axis, a copy and a product, on all devices at once; all processes must call.

    Args:
      axis: of at least two devices.
      dtype: of the product.

    Returns:
      What process 0 measured, in every process.
    """
    platform = "gpu" if mesh.devices.flat[0].platform == "gpu" else "cpu"
    devices, everywhere = mesh.shape[axis], P(mesh.axis_names)

    def time_on_all(call: Callable[[jax.Array], jax.Array], size: int, dtype=jnp.float32) -> float:
        """Seconds of a call on all devices at once, as in a step: CPU devices share cores and memory."""
        # Each device has its part before the clock starts: or every call would first spread them from one device.
        numbers = mesh.size * size // jnp.dtype(dtype).itemsize
        sharding = NamedSharding(mesh, everywhere)
        ones = jax.jit(lambda: jnp.ones(numbers, dtype), out_shardings=sharding)()
        mapped = jax.jit(jax.shard_map(call, mesh=mesh, in_specs=everywhere, out_specs=everywhere))
        return _seconds(processes.compile_together(mapped, ones), ones)

    def swap(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x.reshape(devices, -1), axis, 0, 0, tiled=True).reshape(-1)

    def multiply(x: jax.Array) -> jax.Array:
        square = x.reshape(math.isqrt(x.size), -1)
        return (square @ square).reshape(-1)

    most = _MOST_ON_CPU // mesh.size if platform == "cpu" else _BYTES[platform][1]
    small, large = (min(size, most) // (4 * devices) * 4 * devices for size in _BYTES[platform])
    fixed, full = time_on_all(swap, small), time_on_all(swap, large)
    sent = (devices - 1) / devices * (large - small)
    copies = [time_on_all(lambda x: x + 1, size) for size in (small, large)]
    itemsize = jnp.dtype(dtype).itemsize
    products = [time_on_all(multiply, itemsize * width**2, dtype) for width in _WIDTHS[platform]]
    flops = 2 * (_WIDTHS[platform][1] ** 3 - _WIDTHS[platform][0] ** 3)

    # A small copy is nothing but the call of a program, which an exchange within a step does not pay.
    latency = max(fixed - copies[0], 0.0) / (devices - 1)
    rate = lambda amount, times: amount / max(times[1] - times[0], 1e-9)  # noqa: E731
    link = Link(rate(sent, (fixed, full)), latency, rate(2 * (large - small), copies))
    return _of_first(Rates(link, rate(flops, products)))


def describe(link: Link) -> str:
    """A link in words."""
    return (
        f"{link.bandwidth / 1e9:.2f} GB/s out of a device, {1e6 * link.latency:.0f} us per message, "
        f"copies {link.memory_bandwidth / 1e9:.1f} GB/s"
    )


def fastest(call: Callable[[], T]) -> tuple[T, float]:
    """What a call gives, and the seconds of the fastest of `REPEATS` after one that may compile."""
    answer, times = jax.block_until_ready(call()), []
    for _ in range(REPEATS):
        began = time.perf_counter()
        answer = jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return answer, min(times)


def _seconds(function: Callable[[jax.Array], jax.Array], argument: jax.Array) -> float:
    return fastest(lambda: function(argument))[1]


def _of_first(rates: Rates) -> Rates:
    """Process 0's, in every process."""
    if jax.process_count() == 1:
        return rates
    text = processes.tell_all(json.dumps(dataclasses.asdict(rates)), processes.new_topic("rates"))
    values = json.loads(text)
    return Rates(Link(**values["link"]), values["flops"])
