"""Every test runs on eight CPU devices, strictly: no silent rank promotion, warnings of ours are errors."""

import importlib.metadata
import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / f"moejax-test-cache-{os.getuid()}")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# Most of the suite's time is compilation; the programs are tiny, so LLVM need not optimise them, and jax 0.10 need not
# take its slower way to LLVM. With MOEJAX_TEST_AS_SHIPPED they are compiled as users compile them.
if not os.environ.get("MOEJAX_TEST_AS_SHIPPED"):
    os.environ["XLA_FLAGS"] = " ".join(
        [
            "--xla_backend_optimization_level=0",
            *["--xla_cpu_use_fusion_emitters=false"] * importlib.metadata.version("jax").startswith("0.10."),
            os.environ.get("XLA_FLAGS", ""),
        ]
    )

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--fifth",
        type=int,
        metavar="N",
        help="run every fifth of the chosen tests, beginning with number N modulo 5: five N in a row run all",
    )


@pytest.hookimpl(trylast=True)  # after the choice by marks
def pytest_collection_modifyitems(config, items):
    number = config.getoption("--fifth")
    if number is not None:
        chosen = items[number % 5 :: 5]
        config.hook.pytest_deselected(
            items=[item for place, item in enumerate(items) if (place - number) % 5]
        )
        items[:] = chosen
