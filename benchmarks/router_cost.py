"""What routing and looking at it cost.

    python -m benchmarks.router_cost

The router: each one's forward and backward pass with its losses, against forward and backward of a whole MoE layer with
`topk`, at D = 1024 and 64 experts. The statistics: the quickstart's compiled step as it is, against the same step with
all numbers of the experts left out (XLA then computes none of them); and the host's part, a logged step's line in
metrics.jsonl, TensorBoard and the warnings, spread over the steps between two of them.
"""

import dataclasses
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import moejax
from benchmarks import environment
from benchmarks.twins import VOCAB, Compiled
from configs import quickstart
from moejax.losses import balance_loss, importance_loss, load_loss, z_loss
from train.monitor import Monitor
from train.program import make_program

T, D, F, E = 2048, 1024, 1024, 64
OPTIONS = {"swipe": {"devices": 4}, "topology": {"nodes": 4}, "rounded": {"tile": 32}}
LOSSES = {"balance": balance_loss, "z": z_loss, "importance": importance_loss, "load": load_loss}


def gradient(module, loss, x_TD):
    """A compiled call of forward and backward, by the module's parameters and x."""
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)

    def value(params, x_TD):
        return loss(nnx.merge(graphdef, params, rest), x_TD)

    compiled = jax.jit(jax.value_and_grad(value, argnums=(0, 1))).lower(params, x_TD).compile()
    return lambda: compiled(params, x_TD)


def router_rows() -> list[list[object]]:
    x_TD = jax.random.normal(jax.random.key(0), (T, D))
    token_ids_T = jnp.arange(T, dtype=jnp.int32) % 256
    key = jax.random.key(1)

    def layer_loss(layer, x_TD):
        y_TD, stats = layer(x_TD, key=key)
        return jnp.sum(y_TD * y_TD) + stats.aux_loss

    def router_loss(router, x_TD):
        routing = router(x_TD, token_ids_T=token_ids_T, key=key)
        cotangent_K = jnp.arange(1.0, routing.weights_TK.shape[1] + 1)
        losses = sum(weight * LOSSES[name](routing) for name, weight in router.default_losses.items())
        return jnp.sum(routing.weights_TK * cotangent_K[None, :]) + losses

    calls = {"layer": gradient(moejax.MoE(D, F, E, top_k=2, rngs=nnx.Rngs(0)), layer_loss, x_TD)}
    for name in moejax.ROUTERS:
        router = moejax.make_router(name, D, E, rngs=nnx.Rngs(0), **OPTIONS.get(name, {}))
        calls[name] = gradient(router, router_loss, x_TD)
    times = environment.milliseconds(calls, rounds=9)
    layer = times.pop("layer")
    rows = [[f"`{name}`", f"{ms:.1f}", f"{ms / layer:.1%}"] for name, ms in times.items()]
    return [["the whole layer, `topk`", f"{layer:.0f}", ""], *rows]


def statistics_rows() -> list[list[object]]:
    config = quickstart.config()
    whole, bare = Compiled(config), Compiled(config)
    program = make_program(config, VOCAB, moejax.make_mesh(devices=jax.devices()[:1]))

    def without(state, batch):
        after, metrics = program.train_step(state, batch)
        kept = {name: value for name, value in metrics.items() if not name.startswith("moe/")}
        return dataclasses.replace(after, idle_ME=state.idle_ME), kept

    with jax.set_mesh(program.mesh):
        bare.program = jax.jit(without, donate_argnums=0).lower(bare.state, bare.batch).compile()
    times = environment.milliseconds({"with": whole.step, "without": bare.step}, rounds=60)
    host = host_milliseconds(jax.device_get(whole.step())) / config.log.every
    share = lambda ms: f"{ms / times['with']:.2%}"  # noqa: E731
    return [
        ["step with all statistics", f"{times['with']:.1f}", ""],
        ["without the numbers of the experts", f"{times['without']:.1f}", ""],
        ["difference", f"{times['with'] - times['without']:+.1f}", share(times["with"] - times["without"])],
        [f"host, per step (every {config.log.every}th is logged)", f"{host:.2f}", share(host)],
    ]


def host_milliseconds(metrics: dict) -> float:
    """Median time to report one logged step with the numbers of all experts."""
    scalars = {name: value.item() for name, value in metrics.items() if np.ndim(value) == 0}
    prefix = "moe/layers/"
    layers = {name.removeprefix(prefix): v for name, v in metrics.items() if name.startswith(prefix)}
    log = dataclasses.replace(quickstart.config().log, experts_every=1)
    times = []
    with tempfile.TemporaryDirectory() as folder, open("/dev/null", "w") as nowhere:
        arguments = dict(total_steps=100, start_step=0, tokens_per_step=1, stream=nowhere)
        with Monitor(pathlib.Path(folder), log, **arguments) as monitor:
            for step in range(1, 51):
                began = time.perf_counter()
                monitor.train(step, scalars, layers)
                times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times))


def main() -> None:
    lines = [
        f"Forward and backward, {T:,} tokens, D = {D}, F = {F}, {E} experts, f32; all routers choose as many experts as"
        " they do by default:",
        "",
        environment.table(["what", "ms", "of the layer"], router_rows()),
        "",
        "A step of the quickstart (2,048 tokens, 4 layers of 8 experts):",
        "",
        environment.table(["what", "ms", "of the step"], statistics_rows()),
    ]
    environment.save("router_cost", "What routing and its statistics cost", "\n".join(lines))


if __name__ == "__main__":
    main()
