"""Which device a program is for, as known while it is traced.

Kernels that only exist for some device are chosen here and not when a library is imported: a program may be traced
for devices that this machine does not have, and one process may use several kinds.
"""

import re
from typing import NamedTuple

import jax


class Target(NamedTuple):
    """Fields: `platform` as jax names it ("cpu", "gpu", ...), `kind` as the maker does ("NVIDIA H200")."""

    platform: str
    kind: str

    @property
    def is_hopper(self) -> bool:
        """An NVIDIA GPU of compute capability 9.0."""
        # The abstract mesh, all there is inside a traced function, knows the name but not the capability.
        return self.platform == "gpu" and re.search(r"\bG?H(20|100|200|800)\b", self.kind) is not None


def target() -> Target:
    """The devices of the ambient mesh (`jax.set_mesh`, `shard_map`); without one jax's default device.

    A program that is to run elsewhere has to be traced under such a mesh or under `jax.default_device`: where its
    arguments lie is not known while it is traced.
    """
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return Target(device.platform, device.device_kind)
    default = jax.config.jax_default_device  # type: ignore[attr-defined]
    if default is None or isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    return Target(default.platform, default.device_kind)
