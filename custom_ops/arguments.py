"""Rules for the arguments of the ops, by name. The ops themselves check how arguments must fit each other.

Letters as in the ops: T tokens, K choices per token, N rows, D and F widths, E groups.
"""

from functools import partial

import jax.numpy as jnp

from custom_ops.checks import Rule, array, flag, floating_dtype, whole

local = partial(array, of_one_device=True)

RULES: dict[str, Rule] = {
    "x_TD": local("[T, D]"),
    "dest_TK": local("[T, K]", jnp.integer),
    "weights_TK": local("[T, K]", jnp.floating),
    "rows_ND": local("[N, D]", jnp.floating),
    "dout_NF": local("[N, F]", jnp.floating),
    "w_EDF": local("[E, D, F]", jnp.floating),
    "group_sizes_E": local("[E]", jnp.integer),
    "hidden_N2F": local("[N, 2F]", jnp.floating),
    "da_NF": local("[N, F]", jnp.floating),
    "weight_N": local("[N]", jnp.floating),
    "num_destinations": whole(1),
    "bucket_rows": whole(1),
    "unique": flag,
    "dtype": floating_dtype,
}
