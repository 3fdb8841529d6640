"""Is the loss the same on every layout? 50 f32 steps on 1, 2, 4 and 8 CPU devices, and the largest difference.

    python -m benchmarks.layouts

Same seed, data (the embedded corpus) and config; warm-up of 50 steps and the balance loss over the global batch. The
reference is one device.
"""

import dataclasses
import tempfile

import jax

jax.config.update("jax_num_cpu_devices", 8)

import numpy as np  # noqa: E402  (the devices must be asked for first)

import moejax  # noqa: E402
from benchmarks import environment  # noqa: E402
from configs import quickstart  # noqa: E402
from train.config import TrainConfig  # noqa: E402
from train.data import TrainingBatches, build_tokenizer, load_corpus  # noqa: E402
from train.feed import device_batch  # noqa: E402
from train.program import make_program  # noqa: E402

STEPS = 50
TOLERANCE = 1e-5  # relative, of every loss
LAYOUTS = [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (1, 8), (2, 4), (4, 2), (8, 1)]


def config() -> TrainConfig:
    base = quickstart.config()
    return dataclasses.replace(
        base,
        steps=STEPS,
        model=dataclasses.replace(base.model, num_layers=2, d_model=64),
        optimizer=dataclasses.replace(base.optimizer, warmup_steps=STEPS),
    )


def losses(run: TrainConfig, data: int, expert: int) -> np.ndarray:
    """Loss, auxiliary loss and gradient norm of every step, [STEPS, 3]."""
    tokenizer = build_tokenizer(run.data)
    batches = TrainingBatches(
        load_corpus(run.data, tokenizer),
        batch_size=run.data.batch_size,
        sequence_length=run.data.sequence_length,
        seed=run.seed,
    )
    mesh = moejax.make_mesh(data=data, expert=expert, devices=jax.devices()[: data * expert])
    program = make_program(run, tokenizer.vocab_size, mesh)
    with jax.set_mesh(mesh):
        state = program.init()
        reports = []
        for _ in range(STEPS):
            state, metrics = program.train_step(state, device_batch(next(batches), mesh))
            reports.append(jax.device_get([metrics[name] for name in ("loss", "aux_loss", "grad_norm")]))
        batches.close()
        return np.asarray(reports, np.float64)


def main() -> None:
    run = config()
    with tempfile.TemporaryDirectory() as cache:
        jax.config.update("jax_compilation_cache_dir", cache)
        results = {layout: losses(run, *layout) for layout in LAYOUTS}
    reference = results[(1, 1)]
    rows = []
    for (data, expert), result in results.items():
        worst = np.max(np.abs(result - reference) / np.abs(reference), axis=0)
        rows.append(
            [data * expert, data, expert, f"{result[-1, 0]:.7f}", *(f"{value:.1e}" for value in worst)]
        )
    header = ["devices", "data", "expert", "loss of step 50", "loss", "auxiliary loss", "gradient norm"]
    text = "Largest relative difference from one device over 50 f32 steps:\n\n" + environment.table(
        header, rows
    )
    environment.save("layouts", "The same loss on every layout", text)
    worst_loss = max(
        np.max(np.abs(result - reference)[:, 0] / reference[:, 0]) for result in results.values()
    )
    if not worst_loss <= TOLERANCE:
        raise SystemExit(f"the losses differ by {worst_loss:.1e}, more than {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
