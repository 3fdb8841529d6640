"""How long does a checkpoint hold up the training, and how long is it written in the background?

    python -m benchmarks.checkpoint

Parameters of 64 experts and their two moments over 4 CPU devices, 604 MB; saved five times, the file system's cache not
emptied in between. The first save is told apart: it compiles the copies.
"""

import pathlib
import statistics
import tempfile
import time

import jax

jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp  # noqa: E402  (the devices must be asked for first)

import moejax  # noqa: E402
from benchmarks import environment  # noqa: E402
from moejax.mesh import token_sharding  # noqa: E402
from train.checkpoint import Checkpoints  # noqa: E402
from train.config import CheckpointConfig  # noqa: E402

SAVES = 5


def main() -> None:
    mesh = moejax.make_mesh(data=1, expert=4)
    state = {
        part: jax.device_put(
            jax.random.normal(jax.random.key(number), (64, 512, 1536), jnp.float32), token_sharding(mesh)
        )
        for number, part in enumerate(("params", "first", "second"))
    }
    jax.block_until_ready(state)
    size = sum(array.nbytes for array in state.values())
    blocked, written = [], []
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(pathlib.Path(folder), CheckpointConfig(keep_last=1, keep_best=0)) as checkpoints:
            for step in range(SAVES):
                began = time.perf_counter()
                checkpoints.save(step, state, {}, {})
                blocked.append(time.perf_counter() - began)
                checkpoints.wait()
                written.append(time.perf_counter() - began)
    share = [100 * a / b for a, b in zip(blocked, written, strict=True)]
    rows: list[list[object]] = [
        ["first", f"{blocked[0]:.3f}", f"{written[0]:.2f}", f"{share[0]:.1f}"],
        [
            f"median of {SAVES - 1} more",
            f"{statistics.median(blocked[1:]):.3f}",
            f"{statistics.median(written[1:]):.2f}",
            f"{statistics.median(share[1:]):.1f}",
        ],
    ]
    table = environment.table(["save", "blocked, s", "written, s", "blocked, % of written"], rows)
    environment.save("checkpoint_cpu", f"A checkpoint of {size / 1e6:.0f} MB", table)


if __name__ == "__main__":
    main()
