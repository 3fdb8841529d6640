"""The rules that a config must keep, all checked before a run writes anything."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable

from train.config import MeshConfig, TrainConfig
from train.errors import ConfigError
from train.fields import flatten, get, nearest, shown
from train.layers import MoELayer, hidden_widths, moe_layer_numbers, moe_layers_of, shared_width
from train.paths import with_home

Rule = tuple[str, Callable[[float], bool]]


def whole(low: int, high: int) -> Rule:
    """The rule of an integer between two bounds, both allowed."""
    return f"must be between {low} and {high}", lambda value: low <= value <= high


# Steps, tokens and rows are counted in 32 bits on the device; the rest is bounded far above what has been built.
COUNT, COUNT_OR_ZERO = whole(1, 2**31 - 1), whole(0, 2**31 - 1)
WIDTH = whole(1, 2**20)
_MAX_ELEMENTS = 2**31 - 1
LAYERS = whole(1, 10_000)
POSITIVE: Rule = ("must be a positive finite number", lambda value: 0 < value < math.inf)
NOT_NEGATIVE: Rule = ("must be a finite number of at least 0", lambda value: 0 <= value < math.inf)
SHARE: Rule = ("must be between 0 and 1", lambda value: 0 <= value <= 1)
INNER_SHARE: Rule = ("must be between 0 and 1, neither of them", lambda value: 0 < value < 1)
DECAY: Rule = ("must be at least 0 and below 1", lambda value: 0 <= value < 1)
SEED = whole(0, 2**32 - 1)
AXIS: Rule = (
    f"must be between 1 and {2**20}, or -1 for all remaining devices",
    lambda value: value == -1 or 1 <= value <= 2**20,
)

# Every number of the config is here, so that none goes unchecked, but `model.moe.top_k`, which `_check_moe`
# bounds by another field. An unset one (None), or a word in its place, always passes.
RANGES: dict[str, Rule] = {
    "steps": COUNT,
    "seed": SEED,
    "data.validation_fraction": INNER_SHARE,
    "data.batch_size": COUNT,
    "data.sequence_length": COUNT,
    "model.num_layers": LAYERS,
    "model.d_model": WIDTH,
    "model.num_heads": WIDTH,
    "model.num_kv_heads": WIDTH,
    "model.d_hidden": WIDTH,
    "model.vocab_size": COUNT,
    "model.rope_theta": POSITIVE,
    "model.loss_chunk": COUNT,
    "model.moe.num_experts": WIDTH,
    "model.moe.capacity_factor": POSITIVE,
    "model.moe.chunks": whole(1, 64),  # each is a copy of the layer in the program
    "model.moe.shadow": COUNT_OR_ZERO,
    "model.moe.shared_experts": COUNT_OR_ZERO,
    "model.moe.shared_hidden": WIDTH,
    "model.moe.d_hidden": WIDTH,
    "model.moe.routing.balance_weight": NOT_NEGATIVE,
    "model.moe.routing.z_weight": NOT_NEGATIVE,
    "model.moe.routing.importance_weight": NOT_NEGATIVE,
    "model.moe.routing.load_weight": NOT_NEGATIVE,
    "model.moe.routing.orthogonality_weight": NOT_NEGATIVE,
    "model.moe.routing.groups": COUNT,
    "model.moe.routing.capacity_factor": POSITIVE,
    "model.moe.routing.eval_capacity_factor": POSITIVE,
    "model.moe.routing.jitter": DECAY,
    "model.moe.routing.bias_rate": NOT_NEGATIVE,
    "model.moe.routing.expert_groups": COUNT,
    "model.moe.routing.limit_groups": COUNT,
    "model.moe.routing.scale": POSITIVE,
    "model.moe.routing.max_experts": COUNT,
    "model.moe.routing.iterations": COUNT,
    "model.moe.routing.hash_seed": SEED,
    "model.moe.routing.expert": COUNT_OR_ZERO,
    "model.moe.routing.projection": COUNT,
    "model.moe.routing.devices": COUNT,
    "model.moe.routing.budget_factor": POSITIVE,
    "model.moe.routing.nodes": COUNT,
    "model.moe.routing.off_node_share": SHARE,
    "model.moe.routing.tile": COUNT,
    "optimizer.learning_rate": POSITIVE,
    "optimizer.adam_learning_rate": POSITIVE,
    "optimizer.muon_iterations": whole(1, 100),
    "optimizer.warmup_steps": COUNT_OR_ZERO,
    "optimizer.decay_fraction": SHARE,
    "optimizer.final_fraction": SHARE,
    "optimizer.b1": DECAY,
    "optimizer.b2": DECAY,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.clip_norm": POSITIVE,
    "optimizer.accumulation_steps": WIDTH,
    "mesh.data": AXIS,
    "mesh.expert_node": WIDTH,
    "mesh.expert": WIDTH,
    "mesh.tensor": WIDTH,
    "checkpoint.every": COUNT_OR_ZERO,
    "checkpoint.every_minutes": NOT_NEGATIVE,
    "checkpoint.keep_last": COUNT,
    "checkpoint.keep_best": COUNT_OR_ZERO,
    "eval.every": COUNT_OR_ZERO,
    "eval.max_batches": COUNT,
    "log.every": COUNT,
    "log.experts_every": COUNT_OR_ZERO,
    "log.dead_after": COUNT,
    "log.drop_limit": SHARE,
    "log.spike_factor": NOT_NEGATIVE,
    "log.stall_factor": NOT_NEGATIVE,
    "log.stall_seconds": POSITIVE,
}

LOSSES = (
    "balance_weight",
    "balance_over",
    "z_weight",
    "importance_weight",
    "load_weight",
    "orthogonality_weight",
)
"""Fields of `model.moe.routing` that are no option of one router."""

NOT_EMPTY = ("workdir", "data.path", "data.validation_path", "data.text_field", "data.tokenizer")


def validate(config: TrainConfig, num_devices: int) -> None:
    """Check everything that can be known without reading data.

    Args:
      config: what the user asks for.
      num_devices: devices of the whole run, over all processes.

    Raises:
      ConfigError: the first rule that is broken, with field, value and what is allowed.
    """
    _check_ranges(config)
    _check_model(config)
    mesh = resolve_mesh(config.mesh, num_devices)
    _check_moe(config)
    _check_widths(config, mesh)
    _check_sizes(config)
    _check_batch(config, mesh)


def resolve_mesh(mesh: MeshConfig, num_devices: int) -> MeshConfig:
    """The mesh with -1 replaced by what remains; its axes' product is exactly `num_devices`.

    Raises:
      ConfigError: it does not fit the devices or would leave some unused; says what would fit.
    """
    remaining = num_devices
    for axis in ("expert", "expert_node", "tensor"):
        size = getattr(mesh, axis)
        if remaining % size:
            divisors = [str(n) for n in range(1, remaining + 1) if remaining % n == 0]
            others = "" if remaining == num_devices else " left by the other axes"
            rule = f"must divide the number of devices{others} ({remaining}): {', '.join(divisors)}"
            raise ConfigError(f"mesh.{axis}", size, rule)
        remaining //= size
    if mesh.data not in (-1, remaining):
        axes = _axes_in_use(mesh)
        names, sizes = _product(axes)
        needed = math.prod(axes.values())
        others = " and ".join(f"mesh.{axis} = {size}" for axis, size in axes.items() if axis != "data")
        fits = f"with {others}, mesh.data must be {remaining} or -1"
        if num_devices % mesh.data == 0 and len(axes) == 2:
            fits += f"; with mesh.data = {mesh.data}, mesh.expert must be {num_devices // mesh.data}"
        rule = f"{names} ({sizes} = {needed}) must equal the number of devices ({num_devices}); {fits}"
        raise ConfigError("mesh.data", mesh.data, rule)
    return dataclasses.replace(mesh, data=remaining)


def _axes_in_use(mesh: MeshConfig) -> dict[str, int]:
    """Sizes of `data` and `expert`, and of the other axes that split something."""
    axes = {name: getattr(mesh, name) for name in ("data", "expert_node", "expert", "tensor")}
    return {name: size for name, size in axes.items() if size > 1 or name in ("data", "expert")}


def _product(axes: dict[str, int]) -> tuple[str, str]:
    """Names and sizes, multiplied, as an error shows them."""
    return " × ".join(f"mesh.{name}" for name in axes), " × ".join(map(str, axes.values()))


def _check_ranges(config: TrainConfig) -> None:
    for name, value in flatten(config).items():
        if name in RANGES and isinstance(value, int | float):
            text, is_allowed = RANGES[name]
            if not is_allowed(value):
                raise ConfigError(name, value, text)
        if name in NOT_EMPTY and value is not None and (not value.strip() or "\0" in value):
            raise ConfigError(name, shown(value), "must not be empty, nor hold a NUL character")
    if config.workdir is not None and (there := _file_on_the_way(pathlib.Path(with_home(config.workdir)))):
        raise ConfigError("workdir", config.workdir, f"must be a directory, but {there} is a file")


def _check_model(config: TrainConfig) -> None:
    model = config.model
    if model.d_model % model.num_heads:
        raise ConfigError("model.num_heads", model.num_heads, f"must divide model.d_model ({model.d_model})")
    if (head_dim := model.d_model // model.num_heads) % 2:
        rule = f"must leave an even width per head; model.d_model / model.num_heads is {head_dim}"
        raise ConfigError("model.num_heads", model.num_heads, rule)
    if model.num_kv_heads is not None and model.num_heads % model.num_kv_heads:
        rule = f"must divide model.num_heads ({model.num_heads})"
        raise ConfigError("model.num_kv_heads", model.num_kv_heads, rule)
    moe_layer_numbers(model.moe_layers, model.num_layers)


def _check_moe(config: TrainConfig) -> None:
    from moejax.levels import EXCHANGES
    from moejax.routing import ROUTERS

    moe = config.model.moe
    for name, known in (("model.moe.router", ROUTERS), ("model.moe.exchange", EXCHANGES)):
        value = get(config, name)
        if value not in known:
            raise ConfigError(name, shown(value), f"must be one of {', '.join(known)}{nearest(value, known)}")
    layers = moe_layers_of(config.model)
    if not layers and moe.top_k is None:
        return
    routers = dict.fromkeys((moe.router, *(layer.router for layer in layers.values())))
    _check_options(config, routers)
    for layer in dict.fromkeys((MoELayer(moe.router, moe.num_experts), *layers.values())):
        _check_router(config, layer)
    for name, is_set in (("hidden", moe.shared_hidden is not None), ("gate", moe.shared_gate)):
        if is_set and moe.shared_experts == 0:
            field = f"model.moe.shared_{name}"
            raise ConfigError(field, get(config, field), "needs model.moe.shared_experts of at least 1")
    for count in sorted({layer.num_experts for layer in layers.values()}):
        _check_number_of_experts(config, count)


def _check_number_of_experts(config: TrainConfig, count: int) -> None:
    moe, nodes, per_node = config.model.moe, config.mesh.expert_node, config.mesh.expert
    field, value = _field_of_experts(config, count)
    if moe.shadow != "auto" and moe.shadow > count:
        raise ConfigError("model.moe.shadow", moe.shadow, f"must be between 0 and {field} ({value}), or auto")
    if count % (nodes * per_node):
        split = f"mesh.expert ({per_node})"
        if nodes > 1:
            split = f"mesh.expert_node × mesh.expert ({nodes} × {per_node} = {nodes * per_node})"
        raise ConfigError(field, value, f"must be divisible by {split}")


def _field_of_experts(config: TrainConfig, count: int) -> tuple[str, object]:
    """Name and value of the field that says that a layer has this many experts."""
    moe = config.model.moe
    if count == moe.num_experts:
        return "model.moe.num_experts", count
    return "model.moe.layer_experts", shown(moe.layer_experts)


def _check_widths(config: TrainConfig, mesh: MeshConfig) -> None:
    model = config.model
    if mesh.fsdp and model.d_model % mesh.data:
        rule = f"needs model.d_model ({model.d_model}) to be divisible by mesh.data ({mesh.data})"
        raise ConfigError("mesh.fsdp", mesh.fsdp, rule)
    moe_layers = moe_layer_numbers(model.moe_layers, model.num_layers)
    dense, expert = hidden_widths(model)
    # A width that no layer has may be anything.
    in_use = {"model.d_hidden": dense} if len(moe_layers) < model.num_layers else {}
    in_use |= {"model.moe.d_hidden": expert} if moe_layers else {}
    in_use |= {"model.moe.shared_hidden": shared_width(model)} if moe_layers else {}
    for name, width in in_use.items():
        if width % mesh.tensor:
            raise ConfigError(name, width, f"must be divisible by mesh.tensor ({mesh.tensor})")


def _options(config: TrainConfig) -> dict[str, object]:
    """The options that are set, but for the losses, which every router can have."""
    routing = config.model.moe.routing
    fields = {field.name: getattr(routing, field.name) for field in dataclasses.fields(routing)}
    return {name: value for name, value in fields.items() if value is not None and name not in LOSSES}


def _check_options(config: TrainConfig, routers: Iterable[str]) -> None:
    """Every option is one of some router that the model has."""
    from moejax.routing import is_linear, knows_chances, router_options

    group = "model.moe.routing."
    known = list(dict.fromkeys(option for router in routers for option in router_options(router)))
    for name, value in _options(config).items():
        if name not in known:
            has = f"its options: {', '.join(group + option for option in known)}" if known else "it has none"
            raise ConfigError(group + name, value, f"router {', '.join(routers)} has no such option; {has}")
    load_weight = config.model.moe.routing.load_weight
    if load_weight and not any(map(knows_chances, routers)):
        rule = f"must be 0 or unset: only router noisy knows the chances of its choices, not {', '.join(routers)}"
        raise ConfigError(group + "load_weight", load_weight, rule)
    orthogonality_weight = config.model.moe.routing.orthogonality_weight
    if orthogonality_weight and not any(map(is_linear, routers)):
        rule = f"must be 0 or unset: it is for routers with a linear layer, not {', '.join(routers)}"
        raise ConfigError(group + "orthogonality_weight", orthogonality_weight, rule)


def _check_router(config: TrainConfig, layer: MoELayer) -> None:
    """The router itself says what it takes: it is traced with the options that are set."""
    from flax import nnx

    from moejax.routing import ROUTERS, BadOption, make_router, router_options

    moe = config.model.moe
    group = "model.moe.routing."
    router, num_experts = layer.router, layer.num_experts
    field_of_experts, _ = _field_of_experts(config, num_experts)
    known = router_options(router)
    options = {name: value for name, value in _options(config).items() if name in known}
    own_top_k = ROUTERS[router].default_top_k
    if moe.top_k is None and own_top_k > num_experts:
        rule = f"must be between 1 and {field_of_experts} ({num_experts})"
        raise ConfigError("model.moe.top_k", f"unset ({own_top_k} for router {router})", rule)
    try:
        nnx.eval_shape(
            lambda: make_router(
                router,
                config.model.d_model,
                num_experts,
                top_k=moe.top_k,
                rngs=nnx.Rngs(0),
                **options,
            )
        )
    except BadOption as error:
        field = "model.moe.top_k" if error.argument == "top_k" else group + error.argument
        rule = re.sub(r"\btop_k\b", "model.moe.top_k", error.rule)
        rule = re.sub(r"\bnum_experts\b", field_of_experts, rule)
        raise ConfigError(field, error.value, rule) from error
    tokens = config.data.batch_size // config.optimizer.accumulation_steps * config.data.sequence_length
    if moe.routing.groups is not None and tokens % moe.routing.groups:
        rule = f"must divide the tokens of a batch or of an accumulation part ({tokens})"
        raise ConfigError(group + "groups", moe.routing.groups, rule)


def _check_sizes(config: TrainConfig) -> None:
    """Arrays are indexed with 32 bits: what is larger could not be addressed on a device."""
    from moejax.activations import ACTIVATIONS

    model, data = config.model, config.data
    if data.batch_size * data.sequence_length > _MAX_ELEMENTS:
        rule = f"times data.sequence_length ({data.sequence_length}) must be at most {_MAX_ELEMENTS}"
        raise ConfigError("data.batch_size", data.batch_size, rule)
    columns = ACTIVATIONS[model.activation].columns
    hidden, d_hidden = hidden_widths(model)
    if model.d_model * hidden * columns > _MAX_ELEMENTS:
        rule = f"times model.d_model ({model.d_model}) and {columns} must be at most {_MAX_ELEMENTS}"
        raise ConfigError("model.d_hidden", hidden, rule)
    layers = moe_layers_of(model)
    if not layers:
        return
    if model.d_model * shared_width(model) * columns > _MAX_ELEMENTS:
        field = "model.moe.shared_experts" if model.moe.shared_hidden is None else "model.moe.shared_hidden"
        factors = "" if model.moe.shared_hidden else f"model.moe.d_hidden ({d_hidden}), "
        rule = f"times {factors}model.d_model ({model.d_model}) and {columns} must be at most {_MAX_ELEMENTS}"
        raise ConfigError(field, get(config, field), rule)
    most = max(layer.num_experts for layer in layers.values())
    experts = most // (config.mesh.expert_node * config.mesh.expert)
    if experts * model.d_model * d_hidden * columns > _MAX_ELEMENTS:
        factors = f"experts of a device ({experts}), model.d_model ({model.d_model}) and {columns}"
        rule = f"times {factors} must be at most {_MAX_ELEMENTS}; a larger mesh.expert leaves a device fewer experts"
        raise ConfigError("model.moe.d_hidden", d_hidden, rule)


def _check_batch(config: TrainConfig, mesh: MeshConfig) -> None:
    parts = config.optimizer.accumulation_steps
    axes = {name: size for name, size in _axes_in_use(mesh).items() if name != "tensor"}
    factors, sizes = _product(axes)
    unit = parts * math.prod(axes.values())
    if config.data.batch_size % unit:
        below = config.data.batch_size // unit * unit
        fits = f"{below} or {below + unit}" if below else str(unit)
        if parts > 1:
            factors, sizes = f"optimizer.accumulation_steps × {factors}", f"{parts} × {sizes}"
        rule = f"must be divisible by {factors} ({sizes} = {unit}), such as {fits}"
        raise ConfigError("data.batch_size", config.data.batch_size, rule)


def _file_on_the_way(path: pathlib.Path) -> pathlib.Path | None:
    return next((part for part in (path, *path.parents) if os.path.isfile(part)), None)
