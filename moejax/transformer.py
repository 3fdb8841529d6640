"""A decoder-only transformer with Mixture-of-Experts in any subset of its layers.

Shapes: B sequences, S positions, D model width, V vocabulary, L layers, M of them MoE, W cache window.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from custom_ops.checks import BadArgument, instance_of, one_of, require, require_shape
from moejax.activations import ACTIVATIONS
from moejax.arguments import checked
from moejax.attention import Attention, KVCache
from moejax.layers import FeedForward, RMSNorm, init_matrix
from moejax.losses import BatchLoad, cross_entropy
from moejax.mesh import over_tokens, require_divisible, token_axes
from moejax.moe import MoE, MoEStats
from moejax.order import after, gradients_first
from moejax.routing import ROUTING_DECISION, Routing

_policies = jax.checkpoint_policies
# As a loop, a few small layers spend a tenth of their time on copies into and out of stacked arrays.
_MAX_UNROLLED = 4
_KEEP_ROUTING = _policies.save_only_these_names(ROUTING_DECISION)

# What backward computes again. All but "none" still keep every routing decision.
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _KEEP_ROUTING),
    "full": _KEEP_ROUTING,
}


@dataclass(frozen=True)
class Context:
    """What every layer is told of the tokens.

    Fields:
      tokens_BS: their ids, for routers that look at the token itself.
      segments_BS: document of each position, 0 for padding; None for one document per sequence.
      positions_BS: position within the document.
      rotation_BS2f: what queries and keys are rotated by; see `Attention.rotation`.
    """

    tokens_BS: jax.Array
    segments_BS: jax.Array | None
    positions_BS: jax.Array
    rotation_BS2f: jax.Array


class Block(nnx.Module):
    """x + attention(norm(x)), then + ffn(norm(x)); the FFN is dense or MoE."""

    def __init__(self, attention: Attention, ffn: FeedForward | MoE, d_model: int):
        self.attention_norm = RMSNorm(d_model)
        self.attention = attention
        self.ffn_norm = RMSNorm(d_model)
        self.ffn = ffn

    def __call__(
        self,
        x_BSD: jax.Array,
        context: Context,
        cache: KVCache | None,
        key: jax.Array | None,
        batch_load: BatchLoad | None,
        observe: bool = False,
    ) -> tuple[jax.Array, MoEStats | None, KVCache | None]:
        """Also returns the MoE layer's statistics (None if dense) and the extended cache.

        Args:
          key: this layer's random key, for routers that draw.
          batch_load, observe: see `MoE`.
        """
        x_BSD, cache = self._attend(x_BSD, context, cache)
        if isinstance(self.ffn, MoE):
            token_mask = None if context.segments_BS is None else context.segments_BS > 0
            y_BSD, stats = self.ffn(
                self.ffn_norm(x_BSD),
                token_mask=token_mask,
                token_ids=context.tokens_BS,
                key=key,
                batch_load=batch_load,
                observe=observe,
            )
        else:
            y_BSD, stats = self.ffn(self.ffn_norm(x_BSD)), None
        return x_BSD + y_BSD, stats, cache

    def route(self, x_BSD: jax.Array, context: Context) -> Routing:
        """What the MoE layer's router decides in evaluation."""
        assert isinstance(self.ffn, MoE)
        x_BSD, _ = self._attend(x_BSD, context, None)
        mask_T = None if context.segments_BS is None else (context.segments_BS > 0).reshape(-1)
        x_TD = self.ffn_norm(x_BSD).reshape(-1, x_BSD.shape[-1])
        return self.ffn.router(x_TD, token_mask_T=mask_T, token_ids_T=context.tokens_BS.reshape(-1))

    def _attend(
        self, x_BSD: jax.Array, context: Context, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        normed_BSD = self.attention_norm(x_BSD)
        attended, cache = self.attention(
            normed_BSD, context.segments_BS, context.positions_BS, cache, context.rotation_BS2f
        )
        return x_BSD + attended, cache


_checked = checked(
    cache=instance_of(KVCache, "a KVCache, as Transformer.init_cache returns it"),
    batch_load=instance_of(BatchLoad, "a BatchLoad"),
)


class Transformer(nnx.Module):
    """Pre-norm decoder with rotary positions.

    Layers repeat with a period (1 when all are alike, 2 when every other one is MoE); the blocks of one period are
    stacked over the repetitions. More than a few repetitions run by `lax.scan`, so that the program's size does not
    grow with depth; few ones, whose stacking would cost more than it saves, one after the other.

    Args:
      d_hidden: F of the dense layers.
      moe_layers: numbers of the layers that are MoE.
      moe: arguments of `MoE` beyond `d_model`: `d_hidden`, `num_experts`, `top_k`, `router`, ...
      moe_of_layer: for single MoE layers by number, the arguments that replace `moe`, all of them.
      remat: name in `REMAT_POLICIES`.
      dtype: of all products and activations; parameters are f32.

    Raises:
      ValueError: sizes that do not divide, a layer number beyond the last, an unknown name.
    """

    @checked(activation=one_of(ACTIVATIONS), remat=one_of(REMAT_POLICIES))
    def __init__(
        self,
        *,
        vocab_size: int,
        num_layers: int,
        d_model: int,
        num_heads: int,
        d_hidden: int,
        num_kv_heads: int | None = None,
        activation: str = "swiglu",
        moe_layers: Collection[int] = (),
        moe: Mapping[str, Any] | None = None,
        moe_of_layer: Mapping[int, Mapping[str, Any]] | None = None,
        tie_embeddings: bool = True,
        rope_theta: float = 10_000.0,
        remat: str = "none",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        are_layers = set(moe_layers) <= set(range(num_layers))
        require(are_layers, "moe_layers", moe_layers, f"must be numbers from 0 to {num_layers - 1}")
        self.dtype, self.remat, self.num_layers = dtype, remat, num_layers
        out_scale = (2 * num_layers) ** -0.5  # two additions per layer keep the residual stream at unit scale
        common = {"activation": activation, "out_scale": out_scale, "dtype": dtype}

        def make_block(kind: Mapping[str, Any] | None, rngs: nnx.Rngs) -> Block:
            ffn: FeedForward | MoE
            if kind is not None:
                ffn = MoE(d_model, experts=activation, out_scale=out_scale, dtype=dtype, rngs=rngs, **kind)
            else:
                ffn = FeedForward(d_model, d_hidden, rngs=rngs, **common)
            attention = Attention(
                d_model,
                num_heads,
                num_kv_heads=num_kv_heads,
                rope_theta=rope_theta,
                out_scale=out_scale,
                dtype=dtype,
                rngs=rngs,
            )
            return Block(attention, ffn, d_model)

        kinds = _kinds(num_layers, moe_layers, moe or {}, moe_of_layer or {})
        period = _period(kinds)

        def make_period(rngs: nnx.Rngs) -> nnx.List:
            return nnx.List([make_block(kind, rngs) for kind in kinds[:period]])

        def embedding() -> nnx.Param:
            # Small, as in GPT-2: tied, a token would otherwise begin by predicting itself.
            return init_matrix(rngs, (vocab_size, d_model), axes=("vocab", "embed"), std=0.02)

        self.embedding = embedding()
        self.blocks = _stack(make_period, num_layers // period, rngs)
        self.final_norm = RMSNorm(d_model)
        self.unembedding = None if tie_embeddings else embedding()

    @_checked
    def __call__(
        self,
        tokens_BS: jax.Array,
        *,
        segments_BS: jax.Array | None = None,
        positions_BS: jax.Array | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
        batch_load: BatchLoad | None = None,
        observe: bool = False,
    ) -> tuple[jax.Array, MoEStats | None, jax.Array, KVCache | None]:
        """Run all layers.

        Args:
          tokens_BS: i32 token ids.
          segments_BS: document of each position, 0 for padding (goes to no expert); default: one document, for
            which attention needs no mask.
          positions_BS: position within the document; default: 0, 1, 2, ...
          cache: from `init_cache`; filled with the keys and values of `tokens_BS`.
          key: random key of this call, for routers that draw; every layer draws from one of its own.
          batch_load: when the tokens are one part of a batch, what each MoE layer must know of the whole; fields with
            a leading M, as wide as the layer of most experts.
          observe: also fill the statistics' `choices`.

        Returns:
          hidden_BSD after the last norm; the statistics of the M MoE layers, each field with a leading M (None if
          M = 0), where E is that of the layer of most experts and those that another layer does not have are 0;
          finite_L, whether each layer's output was finite; the filled cache.
        """
        context = self._context(tokens_BS, segments_BS, positions_BS)
        if self.experts_of_layers:
            require_divisible("tokens_BS", tokens_BS, tokens_BS.size, "tokens")
        if cache is not None:
            heads = self.blocks[0].attention.kv_heads
            cache.check(self.num_layers, num_tokens=tokens_BS.shape, heads=heads)
        if batch_load is not None:
            rule = "must be None: there are no MoE layers"
            require(bool(self.experts_of_layers), "batch_load", batch_load, rule)
            batch_load.check(max(self.experts_of_layers), len(self.experts_of_layers))
        graphdef, stacked = nnx.split(self.blocks)
        keys_L = None if key is None else jax.random.split(key, self.num_layers)

        def run_period(x_BSD, layer):
            state, cache, keys, loads = layer
            x_BSD, state = gradients_first(x_BSD, state)  # of later layers, before this one's backward
            blocks = nnx.merge(graphdef, state)
            stats: list[MoEStats] = []
            finite, caches = [], []
            for index, block in enumerate(blocks):
                part, block_key = jax.tree.map(lambda leaf, index=index: leaf[index], (cache, keys))
                load = None
                if isinstance(block.ffn, MoE):
                    load = _load_of(loads, len(stats), block.ffn.num_experts)
                x_BSD, block_stats, part = block(x_BSD, context, part, block_key, load, observe)
                stats += [] if block_stats is None else [block_stats.widened(max(self.experts_of_layers))]
                finite.append(jnp.all(jnp.isfinite(x_BSD)))
                x_BSD = after(x_BSD, finite[-1])
                caches.append(part)
            return x_BSD, (_stack_trees(stats), jnp.stack(finite), _stack_trees(caches))

        policy = REMAT_POLICIES[self.remat]
        if policy is not None:
            run_period = jax.checkpoint(run_period, policy=policy, prevent_cse=False)
        period = len(self.blocks)
        by_period = lambda leaf: leaf.reshape(-1, period, *leaf.shape[1:])  # noqa: E731
        by_layer = lambda leaf: leaf.reshape(-1, *leaf.shape[2:])  # noqa: E731
        loads = jax.tree.map(lambda leaf: leaf.reshape(self._repetitions, -1, *leaf.shape[1:]), batch_load)

        x_BSD = self._embed(tokens_BS)
        x_BSD, (stats, finite, cache) = jax.lax.scan(
            run_period,
            x_BSD,
            (stacked, *jax.tree.map(by_period, (cache, keys_L)), loads),
            # Remat relies on the loop: without one, XLA would merge what is computed again with what was.
            unroll=policy is None and self._repetitions <= _MAX_UNROLLED,
        )
        stats, finite_L, cache = jax.tree.map(by_layer, (stats, finite, cache))
        return self.final_norm(x_BSD), stats, finite_L, cache

    @_checked
    def routings(
        self,
        tokens_BS: jax.Array,
        *,
        segments_BS: jax.Array | None = None,
        positions_BS: jax.Array | None = None,
    ) -> list[Routing]:
        """What each MoE layer's router decides about these tokens in evaluation: M of them, for T = B * S tokens.

        To look at a model; runs layer by layer on one device.
        """
        context = self._context(tokens_BS, segments_BS, positions_BS)
        graphdef, stacked = nnx.split(self.blocks)
        x_BSD, routings = self._embed(tokens_BS), []
        for repetition in range(self._repetitions):
            layer = jax.tree.map(lambda leaf, index=repetition: leaf[index], stacked)
            for block in nnx.merge(graphdef, layer):
                if isinstance(block.ffn, MoE):
                    routings.append(block.route(x_BSD, context))
                x_BSD = block(x_BSD, context, None, None, None)[0]
        return routings

    def _context(
        self, tokens_BS: jax.Array, segments_BS: jax.Array | None, positions_BS: jax.Array | None
    ) -> Context:
        for argument, value in (("segments_BS", segments_BS), ("positions_BS", positions_BS)):
            if value is not None:
                require_shape(argument, value, tokens_BS.shape, "the shape of tokens_BS")
        if positions_BS is None:
            positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1], dtype=jnp.int32), tokens_BS.shape)
        # Without the barrier XLA would take all cosines and sines again in every layer, forward and backward.
        rotation_BS2f = jax.lax.optimization_barrier(self.blocks[0].attention.rotation(positions_BS))
        return Context(tokens_BS, segments_BS, positions_BS, rotation_BS2f)

    @property
    def experts_of_layers(self) -> tuple[int, ...]:
        """How many experts each MoE layer has, [M]."""
        experts = tuple(block.ffn.num_experts for block in self.blocks if isinstance(block.ffn, MoE))
        return experts * self._repetitions

    @property
    def _repetitions(self) -> int:
        return self.num_layers // len(self.blocks)

    @_checked
    def balance_routers(self, load_ME: jax.Array) -> None:
        """Let routers that keep a state change it after an optimizer step, and shadows their estimate of the load.

        Args:
          load_ME: choices per expert of each MoE layer over the whole batch; of a layer with fewer than E experts, the
            first count.
        """
        layers = [block.ffn for block in self.blocks if isinstance(block.ffn, MoE)]
        needed = (len(self.experts_of_layers), max(self.experts_of_layers, default=0))
        require_shape("load_ME", load_ME, needed, "one for each MoE layer")
        load_RME = load_ME.reshape(self._repetitions, len(layers), needed[1])
        for index, layer in enumerate(layers):
            router = layer.router
            graphdef, state = nnx.split(router)

            def balanced(state, load_E, graphdef=graphdef):
                router = nnx.merge(graphdef, state)
                router.balance(load_E)
                return nnx.state(router)

            nnx.update(router, jax.vmap(balanced)(state, load_RME[:, index, : layer.num_experts]))
            layer.follow(load_RME[:, index, : layer.num_experts])

    def _embed(self, tokens_BS: jax.Array) -> jax.Array:
        return self.embedding[...][tokens_BS].astype(self.dtype)

    @property
    def output_embedding(self) -> nnx.Param:
        """The [V, D] matrix that turns hidden states into logits."""
        return self.embedding if self.unembedding is None else self.unembedding

    def _require_width(self, hidden_BSD: jax.Array) -> None:
        shape = (*hidden_BSD.shape[:2], self.output_embedding.shape[-1])
        require_shape("hidden_BSD", hidden_BSD, shape, "as wide as the model's d_model")

    @_checked
    def logits(self, hidden_BSD: jax.Array) -> jax.Array:
        """[B, S, D] -> [B, S, V] f32, whole in memory: for generation; training uses `loss`."""
        self._require_width(hidden_BSD)
        weights = self.output_embedding[...].astype(self.dtype)
        return jnp.dot(hidden_BSD, weights.T, preferred_element_type=jnp.float32)

    @_checked
    def loss(self, hidden_BSD: jax.Array, targets_BS: jax.Array, *, chunk: int) -> jax.Array:
        """Summed cross-entropy in nats over all devices; targets below 0 count nothing.

        Args:
          chunk: tokens per device whose logits are in memory at once.
        """
        self._require_width(hidden_BSD)
        require_shape("targets_BS", targets_BS, hidden_BSD.shape[:2], "one for each token of hidden_BSD")
        require_divisible("hidden_BSD", hidden_BSD, hidden_BSD.shape[0], "sequences")

        def local(weights, _, hidden_BSD, targets_BS):
            axes = token_axes()
            weights_VD = weights.get_value().astype(self.dtype)
            flat = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
            total = cross_entropy(flat, weights_VD, targets_BS.reshape(-1), chunk)
            return jax.lax.psum(total, axes)

        weights = self.output_embedding[...]
        hidden_BSD, weights = gradients_first(hidden_BSD, weights)
        total = over_tokens(
            local,
            nnx.Param(weights, **self.output_embedding.get_metadata()),
            hidden_BSD,
            targets_BS,
            out_specs=lambda _: P(),
        )
        return after(total, total)  # backward begins when the forward pass has been summed

    @_checked
    def init_cache(self, batch_size: int, window: int) -> KVCache:
        """An empty cache of the last `window` positions, [L, B, W, G, h]."""
        shape = (self.num_layers, batch_size, window, *self.blocks[0].attention.kv_heads)
        k, v = (
            jnp.zeros(shape, self.dtype),
            jnp.zeros(shape, self.dtype),
        )  # two buffers: a cache may be donated
        return KVCache(k, v, jnp.full((self.num_layers, window), -1, jnp.int32))


def _kinds(
    num_layers: int,
    moe_layers: Collection[int],
    moe: Mapping[str, Any],
    moe_of_layer: Mapping[int, Mapping[str, Any]],
) -> list[Mapping[str, Any] | None]:
    """The arguments of each layer's `MoE`; None for a dense one."""
    if not set(moe_of_layer) <= set(moe_layers):
        numbers = f"must be for numbers among moe_layers, {sorted(moe_layers)}"
        raise BadArgument("moe_of_layer", dict(moe_of_layer), numbers)
    used = [("moe", moe)] * (not set(moe_layers) <= set(moe_of_layer))
    used += [(f"moe_of_layer[{number}]", arguments) for number, arguments in moe_of_layer.items()]
    for argument, arguments in used:
        for name in ("d_hidden", "num_experts"):
            require(name in arguments, argument, dict(arguments), f"must have {name!r}")
        for name in ("d_model", "experts", "out_scale", "dtype", "rngs"):
            rule = f"must not have {name!r}, which is the model's own"
            require(name not in arguments, argument, dict(arguments), rule)
    return [moe_of_layer.get(layer, moe) if layer in moe_layers else None for layer in range(num_layers)]


def _period(kinds: list[Any]) -> int:
    """Smallest number of layers after which the kinds repeat."""
    n = len(kinds)
    return next(p for p in range(1, n + 1) if n % p == 0 and kinds == kinds[:p] * (n // p))


def _stack(make: Callable[[nnx.Rngs], Any], count: int, rngs: nnx.Rngs) -> Any:
    """`count` independently initialised copies of a module as one, each parameter with a leading dimension."""
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    keys = jax.random.split(rngs.params(), count)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.state(make(nnx.Rngs(key))))(keys))


def _load_of(loads: BatchLoad | None, layer: int, num_experts: int) -> BatchLoad | None:
    """What one MoE layer must know, of its own experts only."""
    if loads is None:
        return None
    return BatchLoad(loads.counted_E[layer, :num_experts], loads.tokens[layer], loads.parts[layer])


def _stack_trees(trees: list[Any]) -> Any:
    """Trees of equal structure as one, with a new leading dimension; None for no trees."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) if trees else None
