"""Devices as a named grid, and the one table that says what is split over which of its axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from custom_ops.varying import varying_axes

# Mesh axes, outermost first. Tokens are split over all of them.
DATA = "data"
EXPERT = "expert"
TOKEN_AXES = (DATA, EXPERT)

# Logical axis of a parameter -> mesh axis (None: every device has all of it).
LOGICAL_AXES: dict[str, str | None] = {
    "layers": None,
    "vocab": None,
    "embed": None,
    "heads": None,
    "hidden": None,
    "router": None,
    "parts": None,
    "experts": EXPERT,
}


def make_mesh(*, data: int = -1, expert: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A ("data", "expert") mesh over all `devices` (default: all there are).

    Args:
      data: size of the data axis; -1 takes what `expert` leaves.
      expert: size of the expert axis.

    Raises:
      ValueError: the axes do not use exactly the devices there are.
    """
    devices = jax.devices() if devices is None else list(devices)
    if data == -1:
        data = max(len(devices) // expert, 1)
    if data * expert != len(devices):
        raise ValueError(
            f"a mesh of data={data} x expert={expert} needs {data * expert} devices, got {len(devices)}"
        )
    return Mesh(np.asarray(devices).reshape(data, expert), TOKEN_AXES, axis_types=(AxisType.Auto,) * 2)


def ambient_mesh() -> AbstractMesh:
    """The mesh set by `jax.set_mesh`, or an empty one."""
    return jax.sharding.get_abstract_mesh()


def token_axes() -> tuple[str, ...]:
    """Axes of the ambient mesh over which tokens are split; empty without a mesh."""
    return tuple(axis for axis in TOKEN_AXES if axis in ambient_mesh().axis_names)


def partition_spec(axes: Sequence[str], ndim: int, mesh: AbstractMesh | Mesh) -> P:
    """Where a parameter with these logical axes lies on `mesh`.

    A parameter with more dimensions than names has been stacked: its leading dimensions are layers.
    """
    names = ("layers",) * (ndim - len(axes)) + tuple(axes)
    mapped = (LOGICAL_AXES[name] for name in names)
    return P(*(axis if axis in mesh.axis_names else None for axis in mapped))


def state_specs(state: Any, mesh: AbstractMesh | Mesh) -> Any:
    """The tree of `PartitionSpec` of an NNX state whose parameters carry `axes` metadata."""

    def spec(variable: nnx.Variable) -> Any:
        value = variable.get_value()
        return variable.replace(partition_spec(variable.get_metadata("axes", ()), value.ndim, mesh))

    return jax.tree.map(spec, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """As `state_specs`, as `NamedSharding`s."""
    is_spec = lambda leaf: isinstance(leaf, P)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(state, mesh), is_leaf=is_spec)


def token_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading dimension is tokens or sequences."""
    return NamedSharding(mesh, P(tuple(axis for axis in TOKEN_AXES if axis in mesh.axis_names)))


def make_varying(tree: Any, axes: Sequence[str]) -> Any:
    """Mark every array as differing between devices along `axes`, inside `shard_map`.

    The gradient's sum over devices then stands exactly here, and nowhere inside what follows.
    """

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def over_tokens(
    fn: Callable[..., Any], params: Any, *arrays: Any, replicated: Any = None, out_specs: Callable[[P], Any]
) -> Any:
    """Run `fn(params, replicated, *arrays)` on each device's own tokens.

    Args:
      params: NNX state; each parameter arrives as the device's own part (see `LOGICAL_AXES`), varying over all
        token axes.
      arrays: leading dimension is tokens, split over all token axes; None stays None.
      replicated: tree of arrays that every device has whole.
      out_specs: from the spec of a token array to the tree of specs of the results.

    Without an ambient mesh, or already inside a `shard_map` over the token axes, `fn` is simply called.
    """
    mesh, axes = ambient_mesh(), token_axes()

    def local(params: Any, replicated: Any, *arrays: Any) -> Any:
        return fn(make_varying(params, axes), replicated, *arrays)

    if set(axes) <= set(mesh.manual_axes):
        return local(params, replicated, *arrays)
    in_specs = (state_specs(params, mesh), P(), *(P(axes) for _ in arrays))
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs(P(axes)))(params, replicated, *arrays)
