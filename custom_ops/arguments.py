"""Rules for the arguments of the ops, by name. The ops themselves check how arguments must fit each other.

Letters as in the ops: T tokens, K choices per token, N rows, D and F widths, E groups.
"""

import jax.numpy as jnp

from custom_ops.checks import Rule, array, flag, floating_dtype, whole

RULES: dict[str, Rule] = {
    "x_TD": array("[T, D]"),
    "dest_TK": array("[T, K]", jnp.integer),
    "weights_TK": array("[T, K]", jnp.floating),
    "rows_ND": array("[N, D]", jnp.floating),
    "dout_NF": array("[N, F]", jnp.floating),
    "w_EDF": array("[E, D, F]", jnp.floating),
    "group_sizes_E": array("[E]", jnp.integer),
    "hidden_N2F": array("[N, 2F]", jnp.floating),
    "da_NF": array("[N, F]", jnp.floating),
    "weight_N": array("[N]", jnp.floating),
    "num_destinations": whole(1),
    "bucket_rows": whole(1),
    "unique": flag,
    "dtype": floating_dtype,
}
