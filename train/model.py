"""From the run's config to the model, its parameters as a plain tree, and where they lie."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import moejax
from moejax.cost import Link
from moejax.levels import CAPACITY_FACTOR
from moejax.mesh import state_shardings
from moejax.routing import is_linear, knows_chances, router_options
from train.config import MeshConfig, MoEConfig, TrainConfig
from train.layers import MoELayer, hidden_widths, moe_layers_of
from train.validation import LOSSES

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


def product_precision(config: TrainConfig) -> AbstractContextManager[object]:
    """The context in which a run's products are computed: true f32 (no TF32 on GPUs), or as the hardware does bf16."""
    return jax.default_matmul_precision("float32") if config.precision == "f32" else nullcontext()


def make_mesh(mesh: MeshConfig) -> jax.sharding.Mesh:
    """The mesh of all devices that `config.mesh` describes."""
    return moejax.make_mesh(
        data=mesh.data, expert_node=mesh.expert_node, expert=mesh.expert, tensor=mesh.tensor
    )


def bias_rate(config: TrainConfig) -> float:
    """Step of the bias that balances without a loss: `model.moe.routing.bias_rate`, or by the length of the run.

    DeepSeek-V3's 1e-3 is for more than 10,000 steps. A short run needs larger steps: the bias must be able to cross
    the scores, which lie between 0 and 1, in the first third of it.
    """
    given = config.model.moe.routing.bias_rate
    return min(max(1e-3, 3 / config.steps), 0.03) if given is None else given


@dataclass(frozen=True)
class Tuning:
    """What a run has measured or decided where its config says `auto`; see `train.tuner`.

    Fields:
      shadow: experts to be copied, S.
      links: what devices reach along the expert axes, by name; None: the constants in `moejax.cost`.
    """

    shadow: int = 0
    links: Mapping[str, Link] | None = None


UNTUNED = Tuning()


def make_model(
    config: TrainConfig, vocab_size: int, rngs: nnx.Rngs, tuning: Tuning = UNTUNED
) -> moejax.Transformer:
    """The transformer that `config.model` describes."""
    model = config.model
    chooses_shadows = model.moe.shadow == "auto"
    d_hidden, expert_hidden = hidden_widths(model)

    def moe(layer: MoELayer) -> dict[str, Any]:
        return {
            "d_hidden": expert_hidden,
            "num_experts": layer.num_experts,
            "top_k": model.moe.top_k,
            "router": layer.router,
            "exchange": model.moe.exchange,
            "overflow": model.moe.overflow,
            "buffer_factor": _buffer_factor(model.moe),
            "chunks": model.moe.chunks,
            "shadow": tuning.shadow if chooses_shadows else model.moe.shadow,
            "keep_demand": chooses_shadows,
            "links": tuning.links,
            "wire": model.moe.wire,
            "received": model.moe.received,
            "expert_bias": model.moe.expert_bias,
            "shared_experts": model.moe.shared_experts,
            "shared_hidden": model.moe.shared_hidden,
            "shared_gate": model.moe.shared_gate,
            **_routing_options(config, layer.router),
        }

    layers = moe_layers_of(model)

    return moejax.Transformer(
        vocab_size=model.vocab_size or vocab_size,
        num_layers=model.num_layers,
        d_model=model.d_model,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        d_hidden=d_hidden,
        activation=model.activation,
        moe_layers=tuple(layers),
        moe_of_layer={number: moe(layer) for number, layer in layers.items()},
        tie_embeddings=model.tie_embeddings,
        rope_theta=model.rope_theta,
        remat=model.remat,
        dtype=DTYPES[config.precision],
        rngs=rngs,
    )


def _buffer_factor(moe: MoEConfig) -> float | None:
    """The config's, or under rounds the same default on every platform; under `drop` None is the layer's own.

    On CPU a bare layer makes room for whatever may arrive, since a loop of rounds must be tied to the collectives
    around it. A training step is (`moejax.order`), and takes a third of the time with buffers of this size.
    """
    if moe.capacity_factor is None and moe.overflow == "rounds":
        return CAPACITY_FACTOR
    return moe.capacity_factor


def _routing_options(config: TrainConfig, router: str) -> dict[str, Any]:
    """The losses' weights and the router's options; what is unset is the router's own."""
    given = {name: value for name, value in asdict(config.model.moe.routing).items() if value is not None}
    known = (*LOSSES, *router_options(router))
    options = {name: value for name, value in given.items() if name in known}
    if not is_linear(router):
        options.pop("orthogonality_weight", None)
    if not knows_chances(router):
        options.pop("load_weight", None)
    if "bias_rate" in known:
        options["bias_rate"] = bias_rate(config)
    return options


@dataclass(frozen=True)
class ModelSpec:
    """A model without its numbers.

    Fields:
      graphdef: NNX structure.
      abstract: NNX state of shapes, with the logical axes of each parameter as metadata.
      config: what it was built from.
      vocab_size: of the tokenizer.
      tuning: where the config says `auto`; changes how the model is computed, not its parameters.
    """

    graphdef: nnx.GraphDef
    abstract: nnx.State
    config: TrainConfig
    vocab_size: int
    tuning: Tuning = UNTUNED

    @classmethod
    def from_config(cls, config: TrainConfig, vocab_size: int, tuning: Tuning = UNTUNED) -> ModelSpec:
        """Trace the constructor; nothing is computed."""
        model = nnx.eval_shape(lambda: make_model(config, vocab_size, nnx.Rngs(0), tuning))
        return cls(*nnx.split(model), config, vocab_size, tuning)

    def init_params(self, key: jax.Array) -> dict[str, Any]:
        """Freshly drawn parameters as nested dicts; for use under `jit`."""
        model = make_model(self.config, self.vocab_size, nnx.Rngs(key), self.tuning)
        return nnx.to_pure_dict(nnx.state(model))

    def merge(self, params: dict[str, Any]) -> moejax.Transformer:
        """The model with these parameters."""
        treedef = jax.tree.structure(self.abstract)
        return nnx.merge(self.graphdef, jax.tree.unflatten(treedef, jax.tree.leaves(params)))

    @property
    def num_moe_layers(self) -> int:
        """M."""
        return len(self.experts_of_layers)

    @property
    def experts_of_layers(self) -> tuple[int, ...]:
        """How many experts each MoE layer has, [M]; arrays of all layers are as wide as the most."""
        return tuple(layer.num_experts for layer in moe_layers_of(self.config.model).values())

    @property
    def has_router_state(self) -> bool:
        """Whether a router keeps a state that no gradient changes."""
        return bool(jax.tree.leaves(nnx.filter_state(self.abstract, moejax.RouterState)))

    def balance_routers(self, params: dict[str, Any], load_ME: jax.Array) -> dict[str, Any]:
        """The parameters with the routers' state after a step whose MoE layers had this load."""
        model = self.merge(params)
        model.balance_routers(load_ME)
        return nnx.to_pure_dict(nnx.state(model))

    def logical_axes(self) -> dict[str, Any]:
        """Each parameter's logical axes, `layers` for stacked ones, in the tree of `init_params`."""

        def axes(variable):
            names = variable.get_metadata("axes")
            value = variable.get_value()
            return variable.replace(Axes(("layers",) * (value.ndim - len(names)) + tuple(names)))

        is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
        return nnx.to_pure_dict(jax.tree.map(axes, self.abstract, is_leaf=is_variable))

    def shardings(self, mesh: jax.sharding.Mesh, *, fsdp: bool | None = None) -> dict[str, Any]:
        """Each parameter's sharding on `mesh`, in the tree of `init_params`; `fsdp`: default `mesh.fsdp`."""
        fsdp = self.config.mesh.fsdp if fsdp is None else fsdp
        return nnx.to_pure_dict(state_shardings(self.abstract, mesh, fsdp=fsdp))

    def abstract_params(self, mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
        """Shape, dtype and sharding of each parameter; without a mesh, on one device."""
        shapes = nnx.to_pure_dict(self.abstract)
        if mesh is None:
            one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=one), shapes)
        place = lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding)  # noqa: E731
        return jax.tree.map(place, shapes, self.shardings(mesh))

    def count_parameters(self) -> tuple[int, int]:
        """All parameters, and those that one token meets: of the experts only the chosen ones."""
        total = active = 0
        for path, leaf, axes in self._parameters():
            total += leaf.size
            active += round(leaf.size * self._share_of_token(path, leaf, axes))
        return total, active

    def numbers_of_expert(self) -> float:
        """Parameters of one expert of a layer; 0 without MoE layers."""
        of_all = sum(leaf.size for _, leaf, axes in self._parameters() if "experts" in axes.names)
        return of_all / max(sum(self.experts_of_layers), 1)

    def moe_of_layers(self, params: Any = None) -> list[moejax.MoE]:
        """The MoE layers of one period of the model with these parameters, those of all periods stacked.

        Without parameters they have shapes in their place.
        """
        model = nnx.merge(self.graphdef, self.abstract) if params is None else self.merge(params)
        return [block.ffn for block in model.blocks if isinstance(block.ffn, moejax.MoE)]

    def active_matrix_parameters(self) -> int:
        """Parameters that one token is multiplied with: no norms, and no embedding that is only looked up."""
        count = 0
        for path, leaf, axes in self._parameters():
            is_matrix = len(set(axes.names) - {"layers", "experts", "parts"}) > 1
            is_looked_up = jax.tree_util.keystr(path, simple=True) == "embedding"
            if is_matrix and not (is_looked_up and not self.config.model.tie_embeddings):
                count += round(leaf.size * self._share_of_token(path, leaf, axes))
        return count

    def _parameters(self) -> list[tuple[tuple[Any, ...], jax.ShapeDtypeStruct, Axes]]:
        """Path, shape and axes of each."""
        paths = jax.tree_util.tree_leaves_with_path(self.logical_axes())
        leaves = jax.tree.leaves(self.abstract)
        return [(path, leaf, axes) for (path, axes), leaf in zip(paths, leaves, strict=True)]

    def _share_of_token(self, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct, axes: Axes) -> float:
        """The share of a parameter that one token meets."""
        if "experts" not in axes.names:
            return 1
        # The blocks of the model's period are its first layers; what is stacked behind them is alike.
        first = int(path[1].key)
        layer = moe_layers_of(self.config.model)[first]
        return layer.experts_per_token(self.config.model) / leaf.shape[axes.names.index("experts")]


@dataclass(frozen=True)
class Axes:
    """Logical axis names of one parameter, as one leaf of a tree."""

    names: tuple[str, ...]
