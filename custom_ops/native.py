"""The compiled libraries under the ops, for CPU and for CUDA: finding them, registering their handlers, calling them.

They are built with the package from `csrc/` (CMakeLists.txt). Where the one that a program needs is missing (no
compiler at installation) or does not load every op falls back to plain XLA, with one warning; `moejax doctor` says so
too.
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

from custom_ops.target import target
from custom_ops.varying import vary_like

# File, handlers, and the platform that jax knows them for.
_CPU = (
    "libmoejax_cpu.so",
    (
        "moejax_make_plan",
        "moejax_permute",
        "moejax_unpermute",
        "moejax_unpermute_backward",
        "moejax_grouped_matmul",
        "moejax_grouped_matmul_drhs",
        "moejax_swiglu",
        "moejax_swiglu_backward",
    ),
    "cpu",
)
# Of the same names and attributes; what Pallas kernels do on GPUs is not among them.
_CUDA = (
    "libmoejax_cuda.so",
    ("moejax_make_plan", "moejax_permute", "moejax_unpermute", "moejax_unpermute_backward"),
    "CUDA",
)


@functools.cache
def _load(file: str, handlers: tuple[str, ...], platform: str) -> ctypes.CDLL | str | None:
    """The library with its handlers registered, why it does not load, or None where it was not built."""
    # An editable installation has the sources in one folder and what was built in another.
    import custom_ops

    for folder in custom_ops.__path__:
        path = pathlib.Path(folder) / file
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                capsules = {name: jax.ffi.pycapsule(getattr(library, name)) for name in handlers}
            except (OSError, AttributeError) as error:  # of another machine, or older than these sources
                return f"{file} does not load: {error}"
            for name, capsule in capsules.items():
                jax.ffi.register_ffi_target(name, capsule, platform=platform)
            return library
    return None


@functools.cache
def _warn_once(kind: str, reason: str) -> None:
    warnings.warn(
        f"moejax runs without its native {kind} ops ({reason}): plain XLA takes their place,"
        " slower; install a compiler and moejax again",
        stacklevel=2,
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
    return _library("CPU", _CPU, "C++ compiler") if _enabled.get() else None


def cuda_library() -> ctypes.CDLL | None:
    """As `cpu_library`; the warning comes only where programs can run on a GPU or are traced for one."""
    if not _enabled.get():
        return None
    # A program that is traced for the CPU beside a GPU may be compiled for the GPU after all.
    gpu = target().platform == "gpu" or jax.default_backend() == "gpu"
    if gpu:
        return _library("CUDA", _CUDA, "nvcc")
    library = _load(*_CUDA)
    return library if isinstance(library, ctypes.CDLL) else None


def _library(kind: str, which: tuple[str, tuple[str, ...], str], compiler: str) -> ctypes.CDLL | None:
    library = _load(*which)
    if isinstance(library, ctypes.CDLL):
        return library
    _warn_once(kind, library or f"no {compiler} was found")
    return None


def describe() -> str:
    """One line on the CPU library, for people."""
    library = cpu_library()
    if library is None:
        return _why_not(_CPU, "C++ compiler")
    library.moejax_instruction_set.restype = ctypes.c_char_p
    return f"built, uses {library.moejax_instruction_set().decode()}"


def describe_cuda() -> str:
    """One line on the CUDA library, for people."""
    if cuda_library() is None:
        return _why_not(_CUDA, "nvcc")
    return "built, for compute capability 8.0 and up"


def _why_not(which: tuple[str, tuple[str, ...], str], compiler: str) -> str:
    if not _enabled.get():
        return "disabled"
    reason = _load(*which)
    return str(reason) if reason else f"not built: no {compiler} was found when moejax was installed"


def computes_in(dtype: DTypeLike) -> bool:
    """Whether the libraries multiply and sum numbers of this dtype; they move every dtype."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)


def call(name: str, results: Any, *operands: jax.Array, **attributes: Any) -> Any:
    """Call a handler of a library; `results` as in `jax.ffi.ffi_call`."""
    for library in (_CPU, _CUDA):
        _load(*library)  # registers the handlers, once
    outputs = jax.ffi.ffi_call(name, results, vmap_method="sequential")(*operands, **attributes)
    # A foreign call's results do not know over which mesh axes they vary.
    return jax.tree.map(lambda output: vary_like(output, *operands), outputs)


def on_cpu(native: Callable[..., Any], otherwise: Callable[..., Any], operands: Sequence[Any]) -> Any:
    """`native(*operands)` in programs compiled for CPU, `otherwise(*operands)` in all others."""
    return lax.platform_dependent(*operands, cpu=native, default=otherwise)


def by_platform(
    operands: Sequence[Any],
    *,
    cpu: Callable[..., Any] | None,
    cuda: Callable[..., Any] | None,
    otherwise: Callable[..., Any],
) -> Any:
    """Of three functions of the operands the one for the platform that the program is compiled for.

    Args:
      cpu, cuda: None where that library cannot do this; left out where it is missing.
    """
    branches = {}
    if cpu is not None and cpu_library() is not None:
        branches["cpu"] = cpu
    if cuda is not None and cuda_library() is not None:
        branches["cuda"] = cuda
    return (
        lax.platform_dependent(*operands, **branches, default=otherwise) if branches else otherwise(*operands)
    )
