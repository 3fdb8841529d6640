"""Exchanges: how rows travel along one mesh axis to the devices that hold their experts, and back.

Shapes: T tokens on this device, D model width, K experts per token, P devices on the axis, B rows of a bucket,
L experts per device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from custom_ops import DispatchPlan, make_plan, permute, unpermute


class Exchange(Protocol):
    """One wire level of the dispatch recursion."""

    def dispatch(
        self, x_TD: jax.Array, ids_TK: jax.Array, weights_TK: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, DispatchPlan]:
        """Send tokens; get rows, their choices among this device's experts, and what `combine` needs."""

    def combine(self, rows_ND: jax.Array, plan: DispatchPlan) -> jax.Array:
        """Send results back and sum each token's: [T, D]."""


@dataclass(frozen=True)
class AllToAll:
    """One `all_to_all` of static buckets [P, B, D] each way.

    A token that chose several experts of one device crosses once and one summed row comes back, so a bucket of B = T
    rows can never overflow. The choices and weights of a row travel in one small message beside it, as f32: [N, 2K].

    Fields:
      axis: mesh axis; P is its size.
      experts_per_device: L. Device p holds the experts p * L .. p * L + L - 1.
    """

    axis: str
    experts_per_device: int

    def dispatch(self, x_TD, ids_TK, weights_TK):
        """As `Exchange.dispatch`; the rows are [P * B, D]."""
        size = jax.lax.axis_size(self.axis)
        num_tokens, top_k = ids_TK.shape
        # Floor division keeps -1 ("none") at -1.
        plan = make_plan(ids_TK // self.experts_per_device, size, bucket_rows=num_tokens, unique=True)
        # f32 holds every expert id exactly; an empty row arrives as zeros, so ids travel shifted by one.
        choices = jnp.concatenate([weights_TK.astype(jnp.float32), (ids_TK + 1).astype(jnp.float32)], axis=1)
        rows_ND = self._swap(permute(x_TD, plan))
        choices_N2K = self._swap(permute(choices, plan))
        ids_NK = jax.lax.stop_gradient(choices_N2K[:, top_k:]).astype(jnp.int32) - 1
        first = jax.lax.axis_index(self.axis) * self.experts_per_device
        mine_NK = (ids_NK >= first) & (ids_NK < first + self.experts_per_device)
        return rows_ND, jnp.where(mine_NK, ids_NK - first, -1), choices_N2K[:, :top_k], plan

    def combine(self, rows_ND, plan):
        """As `Exchange.combine`."""
        return unpermute(self._swap(rows_ND), plan)

    def _swap(self, rows: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(rows, self.axis, split_axis=0, concat_axis=0, tiled=True)


EXCHANGES = {"all_to_all": AllToAll}
