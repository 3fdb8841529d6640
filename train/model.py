"""From the run's config to the model, its parameters as a plain tree, and where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import moejax
from moejax.mesh import state_shardings
from moejax.routing import ROUTERS, router_options
from train.config import MeshConfig, MoEConfig, TrainConfig
from train.validation import LOSSES, hidden_widths, moe_layer_numbers, routers_of_layers

DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}


def product_precision(config: TrainConfig) -> AbstractContextManager[object]:
    """The context in which a run's products are computed: true f32 (no TF32 on GPUs), or as the hardware does bf16."""
    return jax.default_matmul_precision("float32") if config.precision == "f32" else nullcontext()


def make_mesh(mesh: MeshConfig) -> jax.sharding.Mesh:
    """The mesh of all devices that `config.mesh` describes."""
    return moejax.make_mesh(
        data=mesh.data, expert_node=mesh.expert_node, expert=mesh.expert, tensor=mesh.tensor
    )


def experts_per_token(moe: MoEConfig) -> int:
    """`model.moe.top_k`, or the own number of `model.moe.router` where it is unset."""
    return ROUTERS[moe.router].default_top_k if moe.top_k is None else moe.top_k


def bias_rate(config: TrainConfig) -> float:
    """Step of the bias that balances without a loss: `model.moe.routing.bias_rate`, or by the length of the run.

    DeepSeek-V3's 1e-3 is for more than 10,000 steps. A short run needs larger steps: the bias must be able to cross
    the scores, which lie between 0 and 1, in the first third of it.
    """
    given = config.model.moe.routing.bias_rate
    return max(1e-3, 3 / config.steps) if given is None else given


def make_model(config: TrainConfig, vocab_size: int, rngs: nnx.Rngs) -> moejax.Transformer:
    """The transformer that `config.model` describes."""
    model = config.model
    d_hidden, expert_hidden = hidden_widths(model)

    def moe(router: str) -> dict[str, Any]:
        return {
            "d_hidden": expert_hidden,
            "num_experts": model.moe.num_experts,
            "top_k": model.moe.top_k,
            "router": router,
            "exchange": model.moe.exchange,
            "overflow": model.moe.overflow,
            "buffer_factor": model.moe.capacity_factor,
            "chunks": model.moe.chunks,
            "shadow": model.moe.shadow,
            "wire": model.moe.wire,
            "expert_bias": model.moe.expert_bias,
            "shared_experts": model.moe.shared_experts,
            **_routing_options(config, router),
        }

    return moejax.Transformer(
        vocab_size=model.vocab_size or vocab_size,
        num_layers=model.num_layers,
        d_model=model.d_model,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        d_hidden=d_hidden,
        activation=model.activation,
        moe_layers=moe_layer_numbers(model.moe_layers, model.num_layers),
        moe=moe(model.moe.router),
        moe_of_layer={layer: moe(router) for layer, router in routers_of_layers(config.model).items()},
        tie_embeddings=model.tie_embeddings,
        rope_theta=model.rope_theta,
        remat=model.remat,
        dtype=DTYPES[config.precision],
        rngs=rngs,
    )


def _routing_options(config: TrainConfig, router: str) -> dict[str, Any]:
    """The losses' weights and the router's options; what is unset is the router's own."""
    given = {name: value for name, value in asdict(config.model.moe.routing).items() if value is not None}
    known = (*LOSSES, *router_options(router))
    options = {name: value for name, value in given.items() if name in known}
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
    """

    graphdef: nnx.GraphDef
    abstract: nnx.State
    config: TrainConfig
    vocab_size: int

    @classmethod
    def from_config(cls, config: TrainConfig, vocab_size: int) -> ModelSpec:
        """Trace the constructor; nothing is computed."""
        model = nnx.eval_shape(lambda: make_model(config, vocab_size, nnx.Rngs(0)))
        return cls(*nnx.split(model), config, vocab_size)

    def init_params(self, key: jax.Array) -> dict[str, Any]:
        """Freshly drawn parameters as nested dicts; for use under `jit`."""
        return nnx.to_pure_dict(nnx.state(make_model(self.config, self.vocab_size, nnx.Rngs(key))))

    def merge(self, params: dict[str, Any]) -> moejax.Transformer:
        """The model with these parameters."""
        treedef = jax.tree.structure(self.abstract)
        return nnx.merge(self.graphdef, jax.tree.unflatten(treedef, jax.tree.leaves(params)))

    @property
    def num_moe_layers(self) -> int:
        """M."""
        model = self.config.model
        return len(moe_layer_numbers(model.moe_layers, model.num_layers))

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
        leaves = list(self._leaves())
        return sum(leaf.size for _, leaf, _ in leaves), sum(
            leaf.size * top_k // self.config.model.moe.num_experts if "experts" in axes.names else leaf.size
            for (_, leaf, axes), top_k in zip(leaves, self._top_k_of_leaves(), strict=True)
        )

    def _leaves(self) -> Iterator[tuple[Any, Any, Axes]]:
        """Path, shape and logical axes of each parameter."""
        paths = jax.tree_util.tree_leaves_with_path(self.logical_axes())
        for (path, axes), leaf in zip(paths, jax.tree.leaves(self.abstract), strict=True):
            yield path, leaf, axes

    def _top_k_of_leaves(self) -> Iterator[int]:
        """Experts that a token meets in the layers that each parameter is of; of a layer's router its own number."""
        model = self.config.model
        routers = routers_of_layers(model)
        for path, _, _ in self._leaves():
            # Of the blocks of one period, whose kinds repeat, by number: blocks, number, ...
            names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
            layer = int(names[1]) if names[0] == "blocks" else -1
            router = routers.get(layer, model.moe.router)
            yield experts_per_token(replace(model.moe, router=router))

    def active_matrix_parameters(self) -> int:
        """Parameters that one token is multiplied with: no norms, and no embedding that is only looked up."""
        count = 0
        num_experts = self.config.model.moe.num_experts
        for (path, leaf, axes), top_k in zip(self._leaves(), self._top_k_of_leaves(), strict=True):
            is_matrix = len(set(axes.names) - {"layers", "experts", "parts"}) > 1
            is_looked_up = jax.tree_util.keystr(path, simple=True) == "embedding"
            if is_matrix and not (is_looked_up and not self.config.model.tie_embeddings):
                share = top_k / num_experts if "experts" in axes.names else 1
                count += round(leaf.size * share)
        return count


@dataclass(frozen=True)
class Axes:
    """Logical axis names of one parameter, as one leaf of a tree."""

    names: tuple[str, ...]
