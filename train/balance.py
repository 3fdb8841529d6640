"""How evenly the experts worked in a step, from the statistics of its MoE layers, on the device.

Shapes: A accumulation steps, M MoE layers, E experts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe import MoEStats
from moejax.statistics import load_entropy, max_violation
from train.metrics import DROP_CAUSES, LAYERS


def moe_metrics(stats: MoEStats, is_dead_ME: jax.Array, experts_of_layers: tuple[int, ...]) -> dict[str, Any]:
    """Scalars of a step, and under `moe/layers/` the numbers of each layer.

    Args:
      stats: fields with leading dimensions [A, M].
      is_dead_ME: experts that have had no token for long.
      experts_of_layers: [M], how many experts of each layer there are; those beyond count nowhere.
    """
    experts_M = jnp.asarray(experts_of_layers)
    is_dead_ME &= jnp.arange(is_dead_ME.shape[1])[None, :] < experts_M[:, None]
    router = stats.router
    load_ME = jnp.sum(stats.load_E, axis=0)
    by_router_M = jnp.sum(router.dropped, axis=0)
    dropped_M = jnp.sum(stats.dropped, axis=0) + by_router_M
    choices_M = jnp.maximum(jnp.sum(load_ME, axis=-1) + by_router_M, 1)
    tokens_M = jnp.maximum(jnp.sum(router.tokens, axis=0), 1)
    over_tokens = lambda x_AM: jnp.sum(x_AM * router.tokens, axis=0) / tokens_M  # noqa: E731
    causes = dict(zip(DROP_CAUSES, counts_of_causes(stats), strict=True))
    layers = {
        "load": load_ME,
        "max_vio": max_violation(load_ME, experts_M),
        "load_entropy": load_entropy(load_ME, experts_M),
        "router_entropy": over_tokens(router.entropy),
        "logit_norm": over_tokens(router.logit_norm),
        "z": over_tokens(router.z),
        "dropped_fraction": dropped_M / choices_M,
        "padding": 1 - jnp.mean(stats.fill_V, axis=0),
        "dead": is_dead_ME.astype(jnp.int32),
        "rounds": jnp.max(stats.rounds, axis=0),
    }
    return {
        "moe/max_vio": jnp.max(layers["max_vio"]),
        "moe/load_entropy": jnp.min(layers["load_entropy"]),
        "moe/router_entropy": jnp.mean(layers["router_entropy"]),
        "moe/logit_norm": jnp.max(layers["logit_norm"]),
        "moe/z": jnp.mean(layers["z"]),
        "moe/balance_loss": jnp.mean(stats.balance_loss),
        "moe/z_loss": jnp.mean(stats.z_loss),
        "moe/dead_experts": jnp.sum(is_dead_ME),
        "moe/dropped_fraction": jnp.sum(dropped_M) / jnp.sum(choices_M),
        **{f"moe/{name}": jnp.sum(count) / jnp.sum(choices_M) for name, count in causes.items()},
        "moe/padding": jnp.mean(layers["padding"]),
        "moe/invalid": jnp.sum(stats.invalid),
        "moe/rounds": jnp.max(layers["rounds"]),
        **{LAYERS + name: value for name, value in layers.items()},
    }


def counts_of_causes(stats: MoEStats) -> tuple[jax.Array, ...]:
    """Dropped choices in the order of `DROP_CAUSES`."""
    return stats.router.dropped, stats.over_capacity, stats.at_sender, stats.at_receiver
