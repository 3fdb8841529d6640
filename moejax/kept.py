"""What a layer keeps of its forward pass for its backward pass, and what backward forms again.

Kept are decisions, products and what other devices sent; formed again is what memory traffic alone costs: casts of the
weights and of the tokens, activations, masks, plans, copies into buckets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from custom_ops import GROUPED_PRODUCT
from moejax.order import ORDER
from moejax.routing import ROUTING_DECISION

Tree = TypeVar("Tree")

# Rows that arrived from other devices; beside them what is small: their choices, what was served, what was left.
_ROWS, _ACCOUNT = "moe_received_rows", "moe_account"
# Under these prefixes jax names the primitives; sums over devices are small here, the others carry rows.
_SUMS = ("psum", "pmax", "pmin")
_MOVES = ("all_to_all", "all_gather", "ragged_all_to_all", "reduce_scatter")


def received(rows_ND: jax.Array) -> jax.Array:
    """The same rows, known to the policies as having arrived from other devices."""
    return checkpoint_name(rows_ND, _ROWS)


def account(tree: Tree) -> Tree:
    """The same arrays, which are small and kept by every policy."""
    return jax.tree.map(lambda array: checkpoint_name(array, _ACCOUNT), tree)


def _policy(*, rows: bool) -> Callable[..., Any]:
    names = [ROUTING_DECISION, GROUPED_PRODUCT, _ACCOUNT, ORDER, *([_ROWS] if rows else [])]
    is_named = jax.checkpoint_policies.save_only_these_names(*names)
    kept = ("dot_general", *_SUMS, *(_MOVES if rows else ()))

    def is_kept(primitive, *operands, **parameters):
        return primitive.name.startswith(kept) or is_named(primitive, *operands, **parameters)

    return is_kept


# What becomes of rows received from other devices: "keep" holds them for backward; "resend" lets backward send the
# tokens once more, one exchange per level in return for the memory.
RECEIVED = {"keep": _policy(rows=True), "resend": _policy(rows=False)}


def keeping(function: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """The same function, whose backward pass keeps what the policy says, name in `RECEIVED`."""
    # Outside of a loop XLA would merge what is formed again with what was, which is welcome where it is cheap; but
    # rows that are to be sent again it must not keep.
    return jax.checkpoint(function, policy=RECEIVED[policy], prevent_cse=policy == "resend")
