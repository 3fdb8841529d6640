"""Before the first step of a run in several processes: is every device there, and does every axis carry data?

Shapes: n devices on an axis, M numbers for each of them.
"""

from __future__ import annotations

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from train import processes
from train.errors import ConfigError, FailedTogether
from train.place import promised_devices
from train.rates import fastest


def check_devices() -> None:
    """Every process must see the devices it was promised, and as many as every other.

    Raises:
      ConfigError: in every process, naming those that see another number, and the cure.
    """
    if jax.process_count() == 1:
        return
    mine = {"promised": promised_devices(), "seen": jax.local_device_count()}
    topic = processes.new_topic("devices")
    texts = processes.exchange_texts(json.dumps(mine), topic)
    verdict = json.dumps(_wrong_counts([json.loads(text) for text in texts]) if texts else None)
    fault = json.loads(processes.tell_all(verdict, topic))
    if fault is not None:
        number, seen, wanted = fault
        rule = (
            f"process {number} sees {seen} devices, not {wanted}; under Slurm give --gpus-per-node and as many "
            "--ntasks-per-node, never --gpus-per-task; elsewhere look at CUDA_VISIBLE_DEVICES of that process"
        )
        raise ConfigError("devices", jax.device_count(), rule)


def _wrong_counts(everyone: list[dict[str, int | None]]) -> tuple[int, int | None, int | None] | None:
    """(process, devices seen, devices it should see) of the first process that has too few or too many."""
    for number, one in enumerate(everyone):
        wanted = everyone[0]["seen"] if one["promised"] is None else one["promised"]
        if one["seen"] != wanted:
            return number, one["seen"], wanted
    return None


def check_collectives(mesh: Mesh) -> list[str]:
    """Run an all-to-all and an all-reduce with a known answer over every axis of more than one device.

    All processes must call.

    Returns:
      A line per axis and collective, with the time and the bytes that each device sends in it per second.

    Raises:
      FailedTogether: an answer is wrong; names axis, collective and processes.
    """
    size = 2**22 if mesh.devices.flat[0].platform == "gpu" else 2**18
    lines = []
    for axis in mesh.axis_names:
        n = mesh.shape[axis]
        if n == 1:
            continue
        for name, function, share in (
            ("all-to-all", partial(_wrong_rows, axis), (n - 1) / n),
            ("all-reduce", partial(_wrong_sums, axis), 2 * (n - 1) / n),
        ):
            everywhere = P(mesh.axis_names)
            mapped = jax.shard_map(
                lambda function=function, n=n: function(n, size // n),
                mesh=mesh,
                in_specs=(),
                out_specs=everywhere,
            )
            wrong, best = fastest(processes.compile_together(jax.jit(mapped)))
            _refuse(axis, name, sum(int(np.sum(shard.data)) for shard in wrong.addressable_shards))
            sent = share * (size // n) * n * 4
            lines.append(f"{axis} {name}: {1e3 * best:.1f} ms, {sent / best / 1e9:.2f} GB/s from each of {n}")
    return lines


def _wrong_rows(axis: str, n: int, m: int) -> jax.Array:
    """[1]: how many numbers came from the wrong device, or with the wrong value."""
    me = jax.lax.axis_index(axis)
    out_nM = jnp.broadcast_to((me * n + jnp.arange(n))[:, None], (n, m))
    in_nM = jax.lax.all_to_all(out_nM, axis, 0, 0, tiled=True)
    return _over_all(jnp.sum(in_nM != (jnp.arange(n) * n + me)[:, None]))


def _wrong_sums(axis: str, n: int, m: int) -> jax.Array:
    """[1]: how many sums are wrong."""
    me = jax.lax.axis_index(axis)
    sum_M = jax.lax.psum(jnp.full(n * m, me + 1), axis)
    # What a device has added in, so that the answer differs between devices and cannot be folded into a constant.
    return _over_all(jnp.sum(sum_M != n * (n + 1) // 2) + 0 * me)


def _over_all(count: jax.Array) -> jax.Array:
    from moejax.mesh import ambient_mesh, make_varying

    return make_varying(count[None], ambient_mesh().axis_names)


def _refuse(axis: str, name: str, wrong: int) -> None:
    if jax.process_count() == 1:
        texts: list[str] | None = [str(wrong)]
    else:
        topic = processes.new_topic("check")
        texts = processes.exchange_texts(str(wrong), topic)
    bad = [number for number, text in enumerate(texts or []) if int(text)]
    if jax.process_count() > 1:
        bad = json.loads(processes.tell_all(json.dumps(bad), topic))
    if bad:
        raise FailedTogether(
            f"self-check: the {name} over mesh axis {axis} gives wrong numbers in process "
            f"{', '.join(map(str, bad))}; look at its node's network and at NCCL_DEBUG=INFO"
        )
