"""How things are timed, and what a result must say about where it was measured."""

import collections
import datetime
import importlib.metadata
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

ROUNDS = 12
RESULTS = pathlib.Path(__file__).parent / "results"


def milliseconds(calls: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """Median time of each call, taken in turn."""
    times = collections.defaultdict(list)
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def describe() -> str:
    """Date, hardware and versions in one line."""
    cpu = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "optax")
    )
    device = jax.devices()[0].device_kind
    hardware = f"{os.cpu_count()} cores of {cpu}" if device == "cpu" else f"{jax.device_count()} x {device}"
    return f"{datetime.date.today()}, {hardware}, Python {platform.python_version()}, {versions}"


def save(name: str, title: str, table: str) -> None:
    """Print a table and write it to results/<name>.md."""
    text = f"# {title}\n\n{describe()}\n\n{table}\n"
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text)


def table(header: list[str], rows: list[list[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
