"""From host batches to arrays over all devices: each process reads and places its own rows only."""

from __future__ import annotations

import itertools

import jax
import numpy as np
from jax.sharding import Mesh

from moejax.mesh import token_sharding
from train.step import BATCH_FIELDS, Batch


def process_rows(mesh: Mesh, batch_size: int) -> slice:
    """The rows of a global batch that lie on this process's devices.

    Raises:
      ValueError: they are not one block, for the mesh mixes the devices of several processes.
    """
    places = token_sharding(mesh).addressable_devices_indices_map((batch_size, 1)).values()
    blocks = sorted({index[0].indices(batch_size)[:2] for index in places if index is not None})
    if any(end != begin for (_, end), (begin, _) in itertools.pairwise(blocks)):
        raise ValueError(f"rows {blocks} of this process are not one block; order the mesh by process")
    return slice(blocks[0][0], blocks[-1][1])


def abstract_batch(mesh: Mesh, batch_size: int, sequence_length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of what `device_batch` gives."""
    array = jax.ShapeDtypeStruct((batch_size, sequence_length), np.int32, sharding=token_sharding(mesh))
    return dict.fromkeys(BATCH_FIELDS, array)


def device_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """What the model sees of a host batch (`process_rows` of the global one), split over all devices."""
    fields = {name: batch[name] for name in BATCH_FIELDS}
    return jax.make_array_from_process_local_data(token_sharding(mesh), fields)
