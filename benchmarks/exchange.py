"""What each exchange sends, how many rounds each load takes, and how long both take, on CPU devices.

    python -m benchmarks.exchange [--devices 8] [--tokens 512] [--repeats 5] [--ties]

One SwiGLU layer, forward and backward, T tokens per device. Bytes are those of the results of all collectives that
the program asks for outside of loops, per device; time is the median of the repeats, all devices on the same
cores. "one device" is the same layer and the same tokens without a mesh: what expert parallelism costs is the ratio.
With --ties it only prints what the ties of `moejax.order` cost, where a program is safe without them: with room for all
there is no loop. That is CPU time of all cores, which says the same when others use them too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import ClassVar
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import moejax
from benchmarks import environment
from moejax import order
from moejax.levels import CAPACITY_FACTOR
from moejax.mesh import state_shardings, token_sharding
from moejax.routing import Routing
from tests.moejax.loads import LOADS

D, F, E, K = 256, 256, 32, 2
MOST = 1.5  # of the time of one device, for the layer on all, under balanced load
COLLECTIVES = (
    "all_to_all",
    "all_gather",
    "reduce_scatter",
    "psum",
    "psum_invariant",
    "pmax",
    "ragged_all_to_all",
)
VARIANTS = {
    "all_to_all": {},
    "all_to_all, room for all": {"buffer_factor": None},
    "all_to_all, 2 chunks": {"chunks": 2},
    "all_to_all, bf16 rows": {"wire": "bf16"},
    "all_to_all, 2 shadows": {"shadow": 2},
    "all_to_all, drop": {"overflow": "drop"},
    "all_gather": {"exchange": "all_gather"},
    "ragged (emulated)": {"exchange": "ragged"},
}


class Given(nnx.Module):
    """A router that reads its choices from the token itself: `token_ids_T` packs the K of them."""

    default_losses: ClassVar[dict[str, float]] = {}
    top_k = K

    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None):
        ids_TK = token_ids_T[:, None] // jnp.array([1, E], jnp.int32)[None] % E
        weights_TK = jnp.full(ids_TK.shape, 1 / K, jnp.float32)
        logits_TE = jnp.zeros((x_TD.shape[0], E), jnp.float32)
        return Routing(ids_TK, weights_TK, logits_TE, logits_TE + 1 / E, jnp.ones(x_TD.shape[0], bool))


def choices(num_tokens: int, devices: int) -> dict[str, jax.Array]:
    """The choices of all tokens under each load of the tests, packed as `Given` reads them, by the load's name."""
    rng = np.random.default_rng(0)
    of = {load.__name__.replace("_", " "): load(rng, num_tokens, K, E, devices) for load in LOADS}
    return {name: jnp.asarray(ids_TK @ [1, E], jnp.int32) for name, ids_TK in of.items() if ids_TK.min() >= 0}


def compiled_step(mesh, tokens: jax.Array, ids_T: jax.Array, options):
    """The compiled forward and backward pass, the bytes it sends, and its arguments."""
    layer = moejax.MoE(D, F, E, router=Given(), rngs=nnx.Rngs(0), **options)
    graphdef, params = nnx.split(layer)

    def value(params, x_TD, ids_T):
        y_TD, stats = nnx.merge(graphdef, params)(x_TD, token_ids=ids_T)
        total = jnp.mean(y_TD * y_TD)
        return order.after(total, total), (stats.rounds, stats.dropped)

    arguments, shardings = (params, tokens, ids_T), {}
    if mesh is not None:
        placed = (state_shardings(params, mesh), token_sharding(mesh), token_sharding(mesh))
        arguments, shardings = jax.device_put(arguments, placed), {"out_shardings": (None, placed[:2])}
    step = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True), **shardings)
    traced = step.trace(*arguments)
    return traced.lower().compile(), sent_bytes(traced.jaxpr.jaxpr), arguments


def cost_of_ties(mesh, tokens: jax.Array, ids_T: jax.Array, repeats: int) -> str:
    """CPU time of the layer with room for all, as it is and with what ties its collectives left out, taken in turn."""
    options = {"buffer_factor": None}
    tied, _, (params, x_TD, ids_T) = compiled_step(mesh, tokens, ids_T, options)
    with mock.patch.object(order, "_tied", lambda array, number: array):
        untied, *_ = compiled_step(mesh, tokens, ids_T, options)
    assert "popcnt" in tied.as_text() and "popcnt" not in untied.as_text()
    milliseconds: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(repeats + 1):
        for name, step in (("with", tied), ("without", untied)):
            began = time.process_time()
            jax.block_until_ready(step(params, x_TD, ids_T))
            milliseconds[name].append(1e3 * (time.process_time() - began))
    medians = {name: statistics.median(times[1:]) for name, times in milliseconds.items()}
    return f"{medians['with']:.0f} ms of CPU time with ties, {medians['without']:.0f} ms without"


def sent_bytes(program) -> int:
    """Bytes of the results of all collectives that a jaxpr asks for outside of loops, of one device.

    Not read from the compiled program: XLA's CPU backend carries rows of bf16 as f32.
    """
    total = 0
    for equation in program.eqns:
        if equation.primitive.name in COLLECTIVES:
            total += sum(out.aval.size * out.aval.dtype.itemsize for out in equation.outvars)
        elif equation.primitive.name == "cond":  # one of the branches runs, such as that of the platform
            total += max(sent_bytes(branch) for branch in _inner(equation))
        elif equation.primitive.name != "while":
            total += sum(sent_bytes(inner) for inner in _inner(equation))
    return total


def _inner(equation) -> list:
    """The jaxprs among an equation's parameters."""
    found = [value for value in jax.tree.leaves(equation.params, is_leaf=_is_jaxpr) if _is_jaxpr(value)]
    return [getattr(value, "jaxpr", value) for value in found]


def _is_jaxpr(value) -> bool:
    return hasattr(value, "eqns")


def main() -> None:
    """Write results/exchange_cpu.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="per device")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ties", action="store_true", help="only what ties between collectives cost")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    num_tokens = args.devices * args.tokens
    tokens = jax.random.normal(jax.random.key(0), (num_tokens, D))
    packed = choices(num_tokens, args.devices)

    def measure(name: str, mesh, options) -> tuple[list[object], float]:
        """A row, and the milliseconds of the balanced load."""
        step, sent, (params, x_TD, _) = compiled_step(mesh, tokens, packed["balanced"], options)
        row: list[object] = [name, f"{sent / 1e6:.2f}"]
        balanced = 0.0
        for load, ids_T in packed.items():
            if mesh is not None:
                ids_T = jax.device_put(ids_T, token_sharding(mesh))
            (_, (rounds, dropped)), _ = step(params, x_TD, ids_T)
            milliseconds = environment.milliseconds(
                {"step": lambda ids_T=ids_T: step(params, x_TD, ids_T)}, args.repeats
            )
            row.append(f"{int(rounds)}, {int(dropped)}, {milliseconds['step']:.0f}")
            balanced = milliseconds["step"] if load == "balanced" else balanced
        return row, balanced

    mesh = moejax.make_mesh(expert=args.devices)
    if args.ties:
        with jax.set_mesh(mesh):
            print(cost_of_ties(mesh, tokens, packed["balanced"], args.repeats))
        return
    row, one_device = measure("one device", None, {})
    rows, times = [row], {}
    nodes = moejax.make_mesh(expert_node=2, expert=args.devices // 2)
    for at, mesh_options in ((mesh, VARIANTS), (nodes, {"all_to_all, 2 nodes": {}})):
        with jax.set_mesh(at):
            for name, options in mesh_options.items():
                factor = {} if options.get("overflow") == "drop" else {"buffer_factor": CAPACITY_FACTOR}
                row, times[name] = measure(name, at, factor | options)
                rows.append(row)
    header = ["exchange", "MB per device", *packed]
    sizes = f"D={D}, F={F}, E={E}, K={K}, f32, forward + backward"
    what = f"{args.devices} CPU devices, {args.tokens} tokens on each; {sizes}"
    ratio = times["all_to_all"] / one_device
    text = (
        "For each load rounds, dropped choices, ms. Under the balanced load all_to_all on all devices takes "
        f"{ratio:.2f} of the time of one device with the same tokens (goal at most {MOST:g}).\n\n"
    )
    environment.save("exchange_cpu", f"Exchanges: {what}", text + environment.table(header, rows))
    if ratio > MOST:
        raise SystemExit(f"all_to_all takes {ratio:.2f} of the time of one device: more than {MOST:g}")


if __name__ == "__main__":
    main()
