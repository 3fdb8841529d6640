"""Devices as a named grid, and the one table that says what is split over which of its axes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from custom_ops.checks import BadArgument, require
from custom_ops.varying import varying_axes
from moejax.arguments import SIZE, checked

# Mesh axes, outermost first. Experts are split over the expert axes, tokens over those and `data`, the hidden width of
# FFNs over `tensor`.
DATA = "data"
EXPERT_AXES = ("expert_node", "expert")
TENSOR = "tensor"
TOKEN_AXES = (DATA, *EXPERT_AXES)
MESH_AXES = (*TOKEN_AXES, TENSOR)

# Logical axis of a parameter -> mesh axes (none: every device has all of it).
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "layers": (),
    "vocab": (),
    "embed": (),
    "heads": (),
    "hidden": (TENSOR,),
    "router": (),
    "parts": (),
    "experts": EXPERT_AXES,
}


def _axis_size(argument: str, value: Any) -> int:
    """A size, or -1."""
    rule = "must be an integer of at least 1, or -1 for all that the other axes leave"
    require(isinstance(value, (int, np.integer)) and not isinstance(value, bool), argument, value, rule)
    require(value >= 1 or value == -1, argument, value, rule)
    return int(value)


def _devices(argument: str, value: Any) -> list[Any]:
    """Devices in a list, a tuple or an array."""
    listed = list(np.asarray(value).flat) if isinstance(value, (Sequence, np.ndarray)) else []
    is_devices = bool(listed) and all(hasattr(device, "platform") for device in listed)
    require(is_devices, argument, value, "must be devices, such as jax.devices()")
    return listed


@checked(data=_axis_size, expert_node=SIZE, expert=SIZE, tensor=SIZE, devices=_devices)
def make_mesh(
    *,
    data: int = -1,
    expert_node: int = 1,
    expert: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A ("data", "expert_node", "expert", "tensor") mesh over all `devices` (default: all there are).

    Args:
      data: size of the data axis; -1 takes what the others leave.
      expert_node: nodes that the experts are split over; 1 where they stay within a node, or where a network is as
        fast between nodes as within.
      expert: devices of a node that its experts are split over.
      tensor: devices that the hidden width of every FFN is split over.

    Warns:
      UserWarning: on GPUs, `expert` goes over several nodes. It works, but a token crosses the network more often.

    Raises:
      ValueError: the axes do not use exactly the devices there are; names the first that does not fit.
    """
    devices = jax.devices() if devices is None else devices
    inner, left = {"expert_node": expert_node, "expert": expert, "tensor": tensor}, len(devices)
    for axis, size in inner.items():
        rule = f"must divide {left}, the devices that the axes before it leave of {len(devices)}"
        require(left % size == 0, axis, size, rule)
        left //= size
    rule = f"must be {left}, the devices that the other axes leave of {len(devices)}, or -1, which takes them"
    require(data in (-1, left), "data", data, rule)
    shape = (left, expert_node, expert, tensor)
    grid = np.asarray(devices).reshape(shape)
    if devices[0].platform == "gpu" and (nodes := most_nodes(grid)) > 1:
        warnings.warn(
            f"expert = {expert}: the axis crosses {nodes} nodes, so a token crosses the network once per device that "
            f"it goes to there, up to {expert // nodes} times instead of once; split it into expert_node={nodes}, "
            f"expert={expert // nodes}",
            stacklevel=2,
        )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def most_nodes(grid: np.ndarray) -> int:
    """Largest number of nodes along the `expert` axis of a grid of devices with the axes of `make_mesh`.

    A GPU's node is its `slice_index`; where a device has none, its process counts.
    """
    node = np.vectorize(lambda device: getattr(device, "slice_index", device.process_index), otypes=[int])
    by_line = np.moveaxis(node(grid), MESH_AXES.index(EXPERT_AXES[-1]), -1).reshape(-1, grid.shape[2])
    return max(len(set(line)) for line in by_line.tolist())


def ambient_mesh() -> AbstractMesh:
    """The mesh set by `jax.set_mesh`, or an empty one."""
    return jax.sharding.get_abstract_mesh()


def token_axes() -> tuple[str, ...]:
    """Axes of the ambient mesh over which tokens are split; empty without a mesh."""
    return tuple(axis for axis in TOKEN_AXES if axis in ambient_mesh().axis_names)


def expert_axes() -> tuple[str, ...]:
    """Axes of the ambient mesh over which experts are split, outermost first; empty without a mesh."""
    return _splitting(EXPERT_AXES, ambient_mesh())


def tensor_axes() -> tuple[str, ...]:
    """Axes of the ambient mesh over which the hidden width of FFNs is split; empty without a mesh."""
    return _splitting((TENSOR,), ambient_mesh())


def _splitting(axes: Sequence[str], mesh: AbstractMesh | Mesh) -> tuple[str, ...]:
    """Those of the axes that the mesh has more than one device along."""
    return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def partition_spec(axes: Sequence[str | None], ndim: int, mesh: AbstractMesh | Mesh) -> P:
    """Which part of a parameter with these logical axes a device computes with.

    A parameter with more dimensions than names has been stacked: its leading dimensions are layers.
    """
    names = ("layers",) * (ndim - len(axes)) + tuple(axes)
    return P(*(_splitting(_mesh_axes(name), mesh) or None for name in names))


def _mesh_axes(name: str | None) -> tuple[str, ...]:
    """The mesh axes of a logical axis; None is one that is never split."""
    return () if name is None else LOGICAL_AXES[name]


def state_specs(state: Any, mesh: AbstractMesh | Mesh) -> Any:
    """The tree of `PartitionSpec` of an NNX state whose parameters carry `axes` metadata."""
    return _map_parameters(lambda axes, shape: partition_spec(axes, len(shape), mesh), state)


def state_shardings(state: Any, mesh: Mesh, *, fsdp: bool = False) -> Any:
    """Where the parameters of an NNX state lie between steps.

    Args:
      fsdp: split matrices over `data` too, along their model width, where it divides: one that is computed with is
        gathered first, and its gradient is summed and split again (ZeRO stage 3).
    """

    def sharding(axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
        spec = partition_spec(axes, len(shape), mesh)
        if fsdp and len(axes) > 1 and "embed" in axes:
            width = len(shape) - len(axes) + list(axes).index("embed")
            if shape[width] % mesh.shape[DATA] == 0:
                spec = P(*spec[:width], DATA, *spec[width + 1 :])
        return NamedSharding(mesh, spec)

    return _map_parameters(sharding, state)


def _map_parameters(function: Callable[[Sequence[str | None], Sequence[int]], Any], state: Any) -> Any:
    """The state with `function(logical axes, shape)` in place of every parameter."""

    def of(variable: nnx.Variable) -> Any:
        return variable.replace(function(variable.get_metadata("axes", ()), variable.get_value().shape))

    return jax.tree.map(of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def has_axis(module: nnx.Module, name: str) -> bool:
    """Whether any parameter of the module has this logical axis."""
    variables = nnx.to_flat_state(nnx.state(module))
    return any(name in variable.get_metadata("axes", ()) for _, variable in variables)


def token_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading dimension is tokens or sequences."""
    return NamedSharding(mesh, P(tuple(axis for axis in TOKEN_AXES if axis in mesh.axis_names)))


def make_varying(tree: Any, axes: Sequence[str]) -> Any:
    """Mark every array as differing between devices along `axes`, inside `shard_map`.

    The gradient is then summed over devices exactly here, and nowhere inside what follows.
    """

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def _split_over_single(specs: Any, axes: Sequence[str], mesh: AbstractMesh) -> Any:
    """The specs with every parameter also split over those of the axes that have one device.

    Which changes nothing, but that its gradient is not summed along them: XLA's CPU client would copy it for that.
    """
    single = tuple(axis for axis in axes if mesh.shape[axis] == 1)

    def of(spec: P) -> P:
        if not spec:
            return spec
        first = spec[0] or ()
        return P((*((first,) if isinstance(first, str) else first), *single), *spec[1:])

    return jax.tree.map(of, specs, is_leaf=lambda leaf: isinstance(leaf, P))


def require_divisible(argument: str, array: jax.Array, count: int, what: str) -> None:
    """Raise BadArgument unless `count` tokens or sequences can be shared evenly by the mesh's token axes.

    Args:
      what: that which is counted, such as "tokens".
    """
    mesh, axes = ambient_mesh(), _splitting(token_axes(), ambient_mesh())
    parts = math.prod(mesh.shape[axis] for axis in axes if axis not in mesh.manual_axes)
    if count % parts:
        names = " x ".join(f"{axis!r} ({mesh.shape[axis]})" for axis in axes)
        rule = f"its {count} {what} must be a multiple of {parts}, the devices along mesh axes {names}"
        raise BadArgument(argument, array, rule)


def _require_whole_parts(params: Any, mesh: AbstractMesh) -> None:
    """Raise BadArgument for a parameter that the mesh's axes do not divide."""
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    for path, variable in jax.tree_util.tree_leaves_with_path(params, is_leaf=is_variable):
        value, names = variable.get_value(), variable.get_metadata("axes", ())
        for dimension, name in enumerate(("layers",) * (value.ndim - len(names)) + tuple(names)):
            axes = _splitting(_mesh_axes(name), mesh)
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if value.shape[dimension] % parts:
                parameter = jax.tree_util.keystr(path[-1:], simple=True)
                rule = f"its axis {name!r} must be a multiple of {parts}, the devices along mesh axis {axes[0]!r}"
                raise BadArgument(parameter, value, rule)


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

    Raises:
      ValueError: an axis of the mesh is of the Explicit type, or its axes do not divide a parameter.

    Without an ambient mesh, or already inside a `shard_map` over the token axes, `fn` is simply called. Where there is
    no token, every device gets one that is not there: False in a mask, -1 as a number, 0 elsewhere.
    """
    mesh, axes = ambient_mesh(), token_axes()
    if AxisType.Explicit in mesh.axis_types:
        raise ValueError(
            f"mesh axes {mesh.axis_names} are Explicit: make the mesh by moejax.make_mesh, or with "
            f"axis_types=(jax.sharding.AxisType.Auto,) * {len(mesh.axis_names)}"
        )

    def local(params: Any, replicated: Any, *arrays: Any) -> Any:
        return fn(make_varying(params, axes), replicated, *arrays)

    if set(axes) <= set(mesh.manual_axes):
        return local(params, replicated, *arrays)
    _require_whole_parts(params, mesh)
    in_specs = (_split_over_single(state_specs(params, mesh), axes, mesh), P(), *(P(axes) for _ in arrays))
    mapped = jax.shard_map(local, in_specs=in_specs, out_specs=out_specs(P(axes)))
    if all(array is None or array.shape[0] for array in arrays):
        return mapped(params, replicated, *arrays)
    # XLA's partitioners do not take every manual computation with empty arrays, see `moejax.partitioner`.
    results = mapped(
        params, replicated, *jax.tree.map(partial(_absent, math.prod(mesh.shape[a] for a in axes)), arrays)
    )
    cut = lambda spec, part: jax.tree.map(lambda array: array[:0], part) if spec == P(axes) else part  # noqa: E731
    return jax.tree.map(cut, out_specs(P(axes)), results, is_leaf=lambda leaf: isinstance(leaf, P))


def _absent(count: int, empty: jax.Array) -> jax.Array:
    """Tokens that are not there, in the place of none."""
    fill = -1 if jnp.issubdtype(empty.dtype, jnp.integer) else 0
    return jnp.full((count, *empty.shape[1:]), fill, empty.dtype)
