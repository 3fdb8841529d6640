"""The compiled library under the ops: finding it, registering its handlers, calling them.

The library is built with the package from `csrc/` (CMakeLists.txt). Where it is missing (no compiler at installation)
every op falls back to plain XLA, with one warning; `moejax doctor` says so too.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from custom_ops.varying import vary_like

_HANDLERS = (
    "moejax_make_plan",
    "moejax_permute",
    "moejax_unpermute",
    "moejax_unpermute_backward",
    "moejax_grouped_matmul",
    "moejax_grouped_matmul_drhs",
    "moejax_swiglu",
    "moejax_swiglu_backward",
)


_enabled = contextvars.ContextVar("moejax_native_ops", default=True)


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """Within, programs are traced without the library: to compare both ways of computing."""
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def cpu_library() -> ctypes.CDLL | None:
    """The loaded library with its handlers registered; None where it was not built (with a warning) or is disabled."""
    return _load() if _enabled.get() else None


@functools.cache
def _load() -> ctypes.CDLL | None:
    # An editable installation has the sources in one folder and what was built in another.
    import custom_ops

    for folder in custom_ops.__path__:
        path = pathlib.Path(folder) / "libmoejax_cpu.so"
        if path.exists():
            library = ctypes.CDLL(str(path))
            for name in _HANDLERS:
                jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
            return library
    warnings.warn(
        "moejax was installed without its native CPU ops (no C++ compiler was found): plain XLA takes their place,"
        " slower; install a compiler and moejax again",
        stacklevel=2,
    )
    return None


def describe() -> str:
    """One line on what was built and found, for people."""
    library = cpu_library()
    if library is None:
        return "not built: no C++ compiler was found when moejax was installed"
    library.moejax_instruction_set.restype = ctypes.c_char_p
    return f"built, uses {library.moejax_instruction_set().decode()}"


def supports(dtype: DTypeLike) -> bool:
    """Whether the library is there and computes in this dtype."""
    return jnp.dtype(dtype) in (jnp.float32, jnp.float64) and cpu_library() is not None


def call(name: str, results: Any, *operands: jax.Array, **attributes: Any) -> Any:
    """Call a handler of the library; `results` as in `jax.ffi.ffi_call`."""
    _load()  # registers the handlers, once
    outputs = jax.ffi.ffi_call(name, results, vmap_method="sequential")(*operands, **attributes)
    # A foreign call's results do not know over which mesh axes they vary.
    return jax.tree.map(lambda output: vary_like(output, *operands), outputs)


def on_cpu(native: Callable[..., Any], otherwise: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """`native(*operands)` in programs compiled for CPU, `otherwise(*operands)` in all others."""
    return lax.platform_dependent(*operands, cpu=native, default=otherwise)
