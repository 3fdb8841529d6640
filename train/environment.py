"""The environment is input too: what jax would answer with a traceback, an abort or a flood of warnings is one line."""

from __future__ import annotations

import logging
import os
import re
import resource
import sys
import tempfile
import warnings
from typing import Any

from train.errors import ConfigError
from train.fields import shown

log = logging.getLogger("moejax")

MAX_CPU_DEVICES = 4096
"""More would take jax minutes to make."""
OPEN_FILES, FEWEST_FILES = 2**15, 128
"""Files that may be open at once: what is asked for, and below what nothing begins."""
LEAST_KIBIBYTES = 2 * 2**20
"""The least address space: with less, jax does not load everywhere, though it only reserves most of it."""

# Settings of jax that would change a run's numbers behind its config's back, with the only value they may have.
_FIXED = {
    "jax_enable_x64": False,
    "jax_disable_jit": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_threefry_partitionable": True,
    "jax_default_prng_impl": "threefry2x32",
}


def load_jax() -> None:
    """Import jax for a command. What is of no use to a run is switched off with a warning.

    Raises:
      ConfigError: a variable has a value that jax or XLA do not know.
    """
    _check_limits()
    if "jax" not in sys.modules:
        _refuse_unknown_xla_flags()
    try:
        import jax
    except Exception as error:
        raise _cannot_load(error) from error
    if (count := _setting("jax_num_cpu_devices", 0)) > MAX_CPU_DEVICES:
        raise ConfigError("JAX_NUM_CPU_DEVICES", count, f"must be at most {MAX_CPU_DEVICES}")
    for name, value in _FIXED.items():
        if (set_to := _setting(name, value)) != value:
            log.warning("%s = %s is ignored: a run's numbers follow from its config", name.upper(), set_to)
            jax.config.update(name, value)
    _check_cache()


def require_devices() -> None:
    """Start jax's devices, after the processes of a run have joined.

    Raises:
      ConfigError: there are none of the platform that the environment asks for.
    """
    import jax

    try:
        jax.devices()
    except Exception as error:
        platforms = _setting("jax_platforms") or "(nothing)"
        # jax has an assertion without words where it knows the platform and finds no device.
        reason = (
            shown(error, 300) if str(error) else "there is no such device, or its driver or plugin is missing"
        )
        cure = "JAX_PLATFORMS=cpu runs on the CPU"
        if platforms != "cpu":
            cure += ", moejax[cuda13] has the plugin for GPUs, and unset, jax takes what it finds"
        raise ConfigError("JAX_PLATFORMS", shown(platforms), f"{reason}; {cure}") from error


def _check_limits() -> None:
    """Below these, libraries fail in their own ways, the last of them in the first checkpoint."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        files = OPEN_FILES if most == resource.RLIM_INFINITY else min(most, OPEN_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    memory, _ = resource.getrlimit(resource.RLIMIT_AS)
    for name, limit, least, unit in (
        ("ulimit -n", files, FEWEST_FILES, " open files"),
        (
            "ulimit -v",
            memory if memory == resource.RLIM_INFINITY else memory // 1024,
            LEAST_KIBIBYTES,
            " KiB",
        ),
    ):
        if limit != resource.RLIM_INFINITY and limit < least:
            raise ConfigError(name, limit, f"must be at least {least}{unit}, or unlimited")


def _setting(name: str, otherwise: Any = None) -> Any:
    """A setting of jax; `otherwise` where this version has none of that name."""
    import jax

    return getattr(jax.config, name, otherwise)


def _refuse_unknown_xla_flags() -> None:
    """XLA aborts the process that gives it an unknown flag, so one that does nothing else asks it."""
    flags = os.environ.get("XLA_FLAGS")
    if not flags:
        return
    try:
        from jaxlib import xla_client  # once for both processes; it does not look at the flags yet
    except Exception:
        return  # `import jax` will say why
    reader, writer = os.pipe()
    with warnings.catch_warnings(action="ignore"):  # numpy has threads; the child does without them
        child = os.fork()
    if not child:
        try:
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            xla_client.CompileOptions()
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8", errors="replace") as file:
        said = file.read()
    if os.waitpid(child, 0)[1]:
        # Such as: F1127 22:36:00.655035 11010 parse_flags_from_env.cc:234] Unknown flags in XLA_FLAGS: --xla_foo
        reason = next((line.partition("] ")[2] for line in said.splitlines() if "XLA_FLAGS" in line), "")
        rule = f"{reason or 'XLA refuses a value'}; unset it, or look the flag up for this version of jaxlib"
        raise ConfigError("XLA_FLAGS", shown(flags), " ".join(rule.split()))


def _cannot_load(error: Exception) -> ConfigError:
    """Why `import jax` failed; jax names the setting, in lower case or as the variable."""
    named = re.search(r"\bjax_\w+", str(error), re.IGNORECASE)
    name = named[0].upper() if named else ""
    if name in os.environ:
        return ConfigError(
            name, shown(os.environ[name]), f"jax refuses it: {shown(error)}; correct or unset it"
        )
    rule = (
        f"cannot be loaded: {type(error).__name__}: {shown(error)}; look at ulimit -a and at the installation"
    )
    return ConfigError("jax", "(import)", rule)


def _check_cache() -> None:
    """Without this, each program that is compiled warns that the cache cannot be used."""
    import jax

    folder = _setting("jax_compilation_cache_dir")
    if not folder or "://" in folder:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or error
        log.warning("JAX_COMPILATION_CACHE_DIR = %s is left out: %s", folder, reason)
        jax.config.update("jax_compilation_cache_dir", None)
