"""`moejax doctor`: what this machine offers, and whether its devices compute and communicate correctly."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator

from train.environment import load_jax, require_devices
from train.versions import version_of

PACKAGES = ("moejax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")

# In the order in which jax.distributed.initialize() looks for them, each with the variables that it asks for.
CLUSTERS = {
    "Open MPI": ("OMPI_MCA_orte_hnp_uri",),
    "Slurm": ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "Kubernetes": ("KUBERNETES_SERVICE_HOST",),
}


def doctor() -> bool:
    """Print what was found, one `name  value` line each; False when a check gave a wrong answer.

    Raises:
      ConfigError: jax does not start here; what could be found without it has been printed.
    """
    sound = True
    for name, value, is_sound in findings():
        print(f"{name:<22}{value}" if is_sound else f"{name:<22}FAILED: {value}", flush=True)
        sound &= is_sound
    return sound


def findings() -> Iterator[tuple[str, str, bool]]:
    """(name, what was found, whether it is sound), from what cannot fail to what can."""
    yield "python", platform.python_version(), True
    for package in PACKAGES:
        yield package, version_of(package), True
    yield "machine", f"{platform.system()} {platform.machine()}, {_cores()} cores, {_memory()}", True
    yield "cluster", cluster(), True
    load_jax()
    yield _native_ops("CPU")
    require_devices()
    yield from _devices()
    yield _native_ops("CUDA")
    yield from _grouped_matmul()
    yield from _collectives()
    yield from _exchange()


def cluster() -> str:
    """Which cluster jax would find itself on, from the environment alone."""
    for name, variables in CLUSTERS.items():
        if all(os.environ.get(variable) for variable in variables):
            return name
    return "none found: a single process"


def _cores() -> int:
    # The cores that this process may use: in a container fewer than the machine has.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    if "SC_PHYS_PAGES" not in os.sysconf_names:
        return "memory unknown"
    return _gibibytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"


def _devices() -> Iterator[tuple[str, str, bool]]:
    import jax

    yield "platform", f"{jax.default_backend()}, {jax.device_count()} devices", True
    for device in jax.local_devices():
        statistics = device.memory_stats() or {}
        limit = statistics.get("bytes_limit")
        memory = f", {_gibibytes(limit)}" if limit else ""
        yield f"device {device.id}", f"{device.device_kind}{memory}", True


def _native_ops(platform: str) -> tuple[str, str, bool]:
    """What was compiled when moejax was installed; without it plain XLA takes its place, slower."""
    from custom_ops import native

    described = native.describe() if platform == "CPU" else native.describe_cuda()
    return f"native ops, {platform}", described, "does not load" not in described


def _grouped_matmul() -> Iterator[tuple[str, str, bool]]:
    """The implementation that each precision gets here and why, tried on three groups, one of them empty."""
    import jax.numpy as jnp
    import numpy as np

    from custom_ops.grouped_matmul import default_implementation, grouped_matmul

    N, D, F, E = 4, 128, 128, 3
    # Sums of at most D ones: exact in every type, in any order of summation.
    rows_ND = np.arange(N * D).reshape(N, D) % 7 % 2
    w_EDF = np.arange(E * D * F).reshape(E, D, F) % 5 % 2
    sizes_E = np.array([3, 0, 1], np.int32)
    expected_NF = np.concatenate([rows_ND[:3] @ w_EDF[0], rows_ND[3:] @ w_EDF[2]])
    for precision, dtype in (("bf16", jnp.bfloat16), ("f32", jnp.float32)):
        answer_NF = grouped_matmul(
            jnp.asarray(rows_ND, dtype), jnp.asarray(w_EDF, dtype), jnp.asarray(sizes_E)
        )
        is_right = np.array_equal(np.asarray(answer_NF, np.float32), expected_NF)
        name, reason = default_implementation(dtype, D, F, E)
        yield (
            f"grouped matmul {precision}",
            f"{name} ({reason}){'' if is_right else ' gives a wrong answer'}",
            is_right,
        )


def _collectives() -> Iterator[tuple[str, str, bool]]:
    """A psum and an all_to_all over all devices, whose answers are known, with compile and run time."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, PartitionSpec

    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("all",), axis_types=(AxisType.Auto,))
    square = np.arange(count * count, dtype=np.float32).reshape(count, count)
    rows = PartitionSpec("all")

    def psum(x):
        return jax.lax.psum(x, "all")

    def all_to_all(x):
        return jax.lax.all_to_all(x, "all", split_axis=1, concat_axis=0, tiled=True).reshape(1, count)

    expected = {"psum": np.broadcast_to(square.sum(0), square.shape), "all_to_all": square.T}
    for function in (psum, all_to_all):
        run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False))
        started = time.perf_counter()
        jax.block_until_ready(run(square))
        compiled = time.perf_counter()
        answer = run(square)
        jax.block_until_ready(answer)
        finished = time.perf_counter()
        name = function.__name__
        is_right = all(
            np.array_equal(shard.data, expected[name][shard.index]) for shard in answer.addressable_shards
        )
        times = f"{(finished - compiled) * 1e3:.2f} ms, first call {(compiled - started) * 1e3:.0f} ms"
        yield name, times if is_right else f"wrong answer on {count} devices", is_right


def _exchange() -> Iterator[tuple[str, str, bool]]:
    """What was measured between the devices, and by it the cheaper exchange for one layer of a usual shape."""
    import jax

    from moejax.cost import cheapest_exchange, share_of_tokens
    from moejax.levels import CAPACITY_FACTOR
    from moejax.mesh import make_mesh
    from train.rates import describe, measure_rates

    devices = jax.device_count()
    if devices == 1 or jax.process_count() > 1:
        return
    link = measure_rates(make_mesh(expert=devices), "expert").link
    yield "expert axis", describe(link), True
    T, D, E, K = 4096, 1024, 8 * devices, 2
    share = share_of_tokens(E, E // devices, K)
    bucket = round(CAPACITY_FACTOR * share * T)
    name, estimates = cheapest_exchange(
        link, tokens=T, bucket_rows=bucket, share=share, devices=devices, row_bytes=(4 * D, 4 * D), top_k=K
    )
    times = ", ".join(f"{other} {1e3 * seconds:.1f} ms" for other, seconds in estimates.items())
    layer = f"{T} tokens of width {D}, {E} experts, {K} each, f32"
    yield "cheaper exchange", f"{name} by these, for {layer}: {times}", True
