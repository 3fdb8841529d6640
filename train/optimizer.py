"""Optax optimizers and learning-rate schedules of a run."""

from __future__ import annotations

from typing import Any

import jax
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers

from train.config import OptimizerConfig
from train.model import Axes, ModelSpec

# A parameter's dimensions along these are independent matrices; what is left of it is one matrix, or less.
_STACKED = {"layers", "experts", "parts"}
# Matrices that are looked up or choose rather than transform: AdamW's, as in Muon's own recipe.
_LOOKUP = {"vocab", "router"}
# With this RMS of an update Muon takes AdamW's learning rates (Liu et al. 2025, section 2.2).
_MUON_RMS = 0.2


def make_schedule(config: OptimizerConfig, steps: int, peak: float | None = None) -> optax.Schedule:
    """Learning rate of step 0, 1, ... of `steps`: linear warm-up, then the chosen decay to `final_fraction`."""
    peak = config.learning_rate if peak is None else peak
    warmup = lambda step: peak * (step + 1) / max(config.warmup_steps, 1)  # noqa: E731
    rest = max(steps - config.warmup_steps, 1)
    if config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "wsd":
        decay_steps = max(round(steps * config.decay_fraction), 1)
        end = peak * config.final_fraction
        decay = optax.linear_schedule(peak, end, decay_steps, transition_begin=max(rest - decay_steps, 0))
    else:
        decay = optax.constant_schedule(peak)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def updates_done(opt_state: Any) -> jax.Array:
    """How many updates the optimizer counts, i32: behind the step once a batch has been skipped."""
    counts = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
    return counts[0][1]


def make_optimizer(config: OptimizerConfig, steps: int, spec: ModelSpec) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW, or Muon for the matrices and AdamW for the rest.

    The norm is that of the global arrays: an expert counts once on every layout. Matrices decay, norms do not, nor
    does what Muon leaves to AdamW (embeddings, routers, norms).
    """
    axes = spec.logical_axes()
    clip = optax.clip_by_global_norm(config.clip_norm)
    if config.name == "adamw":
        adamw = optax.adamw(
            make_schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=jax.tree.map(lambda a: len(set(a.names) - _STACKED) > 1, axes),
        )
        return optax.chain(clip, adamw)

    muon = optax.contrib.muon(
        make_schedule(config, steps),
        ns_steps=config.muon_iterations,
        weight_decay=config.weight_decay,
        consistent_rms=_MUON_RMS,
        muon_weight_dimension_numbers=jax.tree.map(_matrix_dimensions, axes),
        adam_learning_rate=make_schedule(config, steps, config.adam_learning_rate),
        adam_b1=config.b1,
        adam_b2=config.b2,
    )
    return optax.chain(clip, muon)


def _matrix_dimensions(axes: Axes) -> MuonDimensionNumbers | None:
    """Which dimensions of a parameter are the matrix; None if Muon leaves it to AdamW.

    Told nothing, Optax's Muon takes only two-dimensional parameters and would leave stacked layers and experts out.
    """
    matrix = [i for i, name in enumerate(axes.names) if name not in _STACKED]
    if len(matrix) < 2 or set(axes.names) & _LOOKUP:
        return None
    return MuonDimensionNumbers(reduction_axis=matrix[0], output_axis=matrix[1])
