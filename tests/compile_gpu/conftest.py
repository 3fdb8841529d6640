"""The fixtures of the compile tests: devices, and kernels' reports of the assembler."""

import jax
import pytest

from tests.compile_gpu import h200


@pytest.fixture(scope="session", autouse=True)
def compile_afresh():
    """A program from the cache would not show what the assembler says."""
    enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", enabled)


@pytest.fixture(scope="session")
def h200s():
    """`h200s(count)`: H200s of one node."""
    devices = {count: h200.devices(count) for count in (1, 8)}
    return devices.__getitem__
