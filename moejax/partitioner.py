"""The choice of XLA's partitioner, made once when moejax is imported.

Shardy in jax 0.11 ends the process while it compiles some programs with `shard_map`: its pattern for unused inputs of a
manual computation follows a null pointer. Training runs with several MoE layers on several devices are among them, and
the smallest program is in `tests/moejax/test_no_tokens.py`. jax 0.10 and 0.12 compile all of them.
"""

import os

import jax

VARIABLE = "JAX_USE_SHARDY_PARTITIONER"


def avoid_shardy_where_it_dies() -> None:
    """On jax 0.11 take GSPMD, the partitioner before Shardy, unless the environment says which one to take."""
    if jax.__version_info__[:2] == (0, 11) and VARIABLE not in os.environ:
        jax.config.update(VARIABLE.lower(), False)
