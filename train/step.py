"""One optimizer step and one evaluation step, as compiled functions of the run's state.

Shapes: B sequences of the global batch, S positions, A accumulation steps, L layers, M MoE layers, E experts (of the
layer of most), W watched tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import moejax
from moejax.mesh import token_sharding
from moejax.order import waiting
from train.balance import moe_metrics
from train.finite import FiniteCheck
from train.model import ModelSpec
from train.observe import NEVER, WATCHED_TOKENS
from train.optimizer import updates_done

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]

# What the model sees of a batch; the iterator's bookkeeping stays on the host.
BATCH_FIELDS = ("tokens", "targets", "segments", "positions")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything a step changes.

    Fields:
      step: optimizer steps done, i32.
      params: nested dicts of f32 arrays.
      opt_state: Optax state.
      key: data of the run's random key, u32, from which each step's is folded; for routers that draw.
      idle_ME: steps since each expert of each MoE layer last had a token, i32.
      first_MW: first choice of each watched token at the last evaluation, i32; see `train.observe`.
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    key: jax.Array
    idle_ME: jax.Array
    first_MW: jax.Array


def make_init(
    spec: ModelSpec, optimizer: optax.GradientTransformation, seed: int
) -> Callable[[], TrainState]:
    """The state before the first step; the same on every layout."""

    def init() -> TrainState:
        param_key, key = jax.random.split(jax.random.key(seed))
        params = spec.init_params(param_key)
        most = max(spec.experts_of_layers, default=spec.config.model.moe.num_experts)
        idle_ME = jnp.zeros((spec.num_moe_layers, most), jnp.int32)
        data = spec.config.data
        watched = min(data.batch_size * data.sequence_length, WATCHED_TOKENS)
        first_MW = jnp.full((spec.num_moe_layers, watched), NEVER, jnp.int32)
        key_data = jax.random.key_data(key)
        return TrainState(jnp.int32(0), params, optimizer.init(params), key_data, idle_ME, first_MW)

    return init


def state_shardings(spec: ModelSpec, state: TrainState, mesh: Mesh) -> TrainState:
    """A `TrainState` of shardings: optimizer moments lie with their parameters, all else is on every device."""
    by_path = dict(jax.tree_util.tree_leaves_with_path(spec.shardings(mesh)))
    replicated = NamedSharding(mesh, P())

    def of(path: tuple[Any, ...], _: Any) -> NamedSharding:
        # The path of a parameter in the state, and of each of its moments, ends with its path in the model.
        tails = (path[start:] for start in range(len(path)))
        return next((by_path[tail] for tail in tails if tail in by_path), replicated)

    return jax.tree_util.tree_map_with_path(of, state)


def make_loss(
    spec: ModelSpec,
) -> Callable[..., tuple[jax.Array, Metrics]]:
    """`(params, part, count, key, batch_load=None) -> (this part's share of the batch's loss, what it reports)`.

    `key` is the part's random key. The shares of all accumulation steps add up to cross-entropy per token (of `count`
    in the whole batch) plus the mean of the auxiliary losses, so their gradients add up too. With the load of the whole
    batch (`make_batch_load`) that mean is the loss of the whole batch.
    """
    accumulation = spec.config.optimizer.accumulation_steps

    def loss(
        params: dict[str, Any],
        part: Batch,
        count: jax.Array,
        key: jax.Array,
        batch_load: moejax.BatchLoad | None = None,
    ) -> tuple[jax.Array, Metrics]:
        model = spec.merge(params)
        hidden, stats, finite_L, _ = model(
            part["tokens"],
            segments_BS=part["segments"],
            positions_BS=part["positions"],
            key=key,
            batch_load=batch_load,
        )
        cross_entropy = model.loss(hidden, part["targets"], chunk=spec.config.model.loss_chunk) / count
        aux_loss = jnp.float32(0) if stats is None else jnp.sum(stats.aux_loss) / accumulation
        report = {"loss": cross_entropy, "aux_loss": aux_loss, "finite_layers": finite_L, "stats": stats}
        return cross_entropy + aux_loss, report

    return loss


def make_train_step(
    spec: ModelSpec, optimizer: optax.GradientTransformation, schedule: optax.Schedule, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """One optimizer step on one global batch, not yet compiled.

    It reports scalars, and what is needed to name the origin of a NaN: `finite_layers` [L], and `finite_grads` as
    `FiniteCheck` gives it.
    """
    accumulation = spec.config.optimizer.accumulation_steps
    check_finite = FiniteCheck(spec)
    value_and_grad = jax.value_and_grad(make_loss(spec), has_aux=True)
    routing = spec.config.model.moe.routing
    needs_batch_load = accumulation > 1 and spec.num_moe_layers > 0 and routing.balance_over == "batch"
    batch_load_of = make_batch_load(spec)
    skips = spec.config.checkpoint.on_nan == "skip"

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        count = jnp.maximum(jnp.sum(batch["targets"] >= 0), 1).astype(jnp.float32)
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        whole_params = gather(spec, state.params, mesh)
        batch = waiting(batch, (count, whole_params) if spec.config.mesh.fsdp else count)

        def add_part(grads: Any, keyed: tuple[jax.Array, Batch]) -> tuple[Any, Metrics]:
            part_key, part = keyed
            (_, report), part_grads = value_and_grad(whole_params, part, count, part_key, batch_load)
            return jax.tree.map(jnp.add, grads, part_grads), report

        if accumulation == 1:
            (_, report), grads = value_and_grad(whole_params, batch, count, key)
            reports = jax.tree.map(lambda x: x[None], report)
        else:
            zeros = jax.tree.map(jnp.zeros_like, state.params)
            keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(jnp.arange(accumulation))
            parts = keys, _split(batch, accumulation, mesh)
            batch_load = batch_load_of(whole_params, parts) if needs_batch_load else None
            grads, reports = jax.lax.scan(add_part, zeros, parts)

        grads = waiting(grads, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        idle_ME, moe = state.idle_ME, {}
        if (stats := reports["stats"]) is not None:
            load_ME = jnp.sum(stats.load_E, axis=0)
            idle_ME = jnp.where(load_ME > 0, 0, idle_ME + 1)
            is_dead_ME = idle_ME >= spec.config.log.dead_after
            moe = moe_metrics(stats, is_dead_ME, spec.experts_of_layers)
            if spec.has_router_state:
                params = spec.balance_routers(params, load_ME)
        metrics = {
            "loss": jnp.sum(reports["loss"]),
            "aux_loss": jnp.sum(reports["aux_loss"]),
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(updates_done(state.opt_state)),
            "finite_layers": jnp.all(reports["finite_layers"], axis=0),
            "finite_grads": check_finite(grads),
            **moe,
        }
        new = replace(state, step=state.step + 1, params=params, opt_state=opt_state, idle_ME=idle_ME)
        if skips:
            sums = jnp.stack([metrics[name] for name in ("loss", "aux_loss", "grad_norm")])
            checks = (jnp.isfinite(sums), metrics["finite_layers"], metrics["finite_grads"])
            is_finite = jnp.all(jnp.concatenate(checks))
            old = replace(state, step=new.step)
            new = jax.tree.map(lambda ours, theirs: jnp.where(is_finite, ours, theirs), new, old)
            metrics["skipped"] = jnp.int32(~is_finite)
        return new, metrics

    return step


def _split(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """[B, S] -> [A, B / A, S], each part spread over all devices."""
    sharding = NamedSharding(mesh, P(None, *token_sharding(mesh).spec))

    def split(x: jax.Array) -> jax.Array:
        # Sequence b goes to part b mod A, so that every device cuts up its own sequences.
        x = x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, sharding)

    return jax.tree.map(split, batch)


def make_batch_load(spec: ModelSpec) -> Callable[[dict[str, Any], tuple[jax.Array, Batch]], moejax.BatchLoad]:
    """`(params, (keys, parts)) -> load of the whole batch` for each MoE layer, by a forward pass over all parts."""

    def batch_load(params: dict[str, Any], keyed: tuple[jax.Array, Batch]) -> moejax.BatchLoad:
        def count(_: None, one: tuple[jax.Array, Batch]) -> tuple[None, tuple[jax.Array, jax.Array]]:
            key, part = one
            positions, segments = part["positions"], part["segments"]
            stats = spec.merge(params)(part["tokens"], segments_BS=segments, positions_BS=positions, key=key)[
                1
            ]
            assert stats is not None
            return None, (stats.router.counted_E, stats.router.tokens)

        counted_AME, tokens_AM = jax.lax.scan(count, None, keyed)[1]
        tokens_M = jnp.sum(tokens_AM, axis=0)
        parts_M = jnp.full(tokens_M.shape, float(tokens_AM.shape[0]))
        return moejax.BatchLoad(jnp.sum(counted_AME, axis=0), tokens_M, parts_M)

    return batch_load


def gather(spec: ModelSpec, params: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """On CPU, what FSDP has split is put together before the first layer; elsewhere each layer gathers its own.

    XLA's CPU client cannot keep a gather apart from a loop that communicates, see `moejax.order`.
    """
    if not spec.config.mesh.fsdp or mesh.devices.flat[0].platform != "cpu":
        return params
    return jax.lax.with_sharding_constraint(params, spec.shardings(mesh, fsdp=False))


def make_eval_step(spec: ModelSpec, mesh: Mesh) -> Callable[[dict[str, Any], Batch], Metrics]:
    """`(params, batch) -> sums over the batch`, not yet compiled.

    `loss` is the summed cross-entropy in nats of `tokens` targets. With MoE layers also what `train.observe` adds up:
    `load` [M, E], `dropped` and of these `by_router` [M], `routed` tokens, `together` [M, E, E], and `first` [M, W],
    the first choices of the first tokens of the batch.
    """

    def step(params: dict[str, Any], batch: Batch) -> Metrics:
        count = jnp.sum(batch["targets"] >= 0)
        params = gather(spec, params, mesh)
        batch = waiting(batch, (count, params) if spec.config.mesh.fsdp else count)
        model = spec.merge(params)
        hidden, stats, *_ = model(
            batch["tokens"], segments_BS=batch["segments"], positions_BS=batch["positions"], observe=True
        )
        total = model.loss(hidden, batch["targets"], chunk=spec.config.model.loss_chunk)
        sums = {"loss": total, "tokens": count}
        if stats is not None:
            assert stats.choices is not None
            sums |= {
                "load": stats.load_E,
                "dropped": stats.dropped + stats.router.dropped,
                "by_router": stats.router.dropped,
                "routed": stats.router.tokens[0],
                "together": stats.choices.together_EE,
                "first": stats.choices.first_T[:, :WATCHED_TOKENS],
            }
        return sums

    return step
