"""Does MoE pay? The same steps on the same data, with experts and as a dense model of the same active parameters.

    python -m benchmarks.moe_vs_dense [--steps 2000]

Both train on the embedded corpus (the source of the Python standard library, bytes), one after the other on this
machine, and are evaluated on the whole validation split. The dense twin's hidden width is chosen such that a token
meets as many parameters as in the MoE. A third run is the MoE once more with as many steps as fit into the dense twin's
training time, going by the measured times of the first two: its learning rate has come down when that time is over.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile

from benchmarks import environment
from train.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from train.loop import train
from train.memory import keep_freed_memory
from train.model import ModelSpec

VOCAB = 257  # bytes and the separator


def moe_config(steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        data=DataConfig(batch_size=32, sequence_length=128),
        model=ModelConfig(d_model=64, num_heads=2, moe=MoEConfig(num_experts=32, top_k=2, d_hidden=96)),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.015,
            adam_learning_rate=0.008,
            b2=0.99,
            warmup_steps=100,
            final_fraction=0.02,
        ),
        checkpoint=CheckpointConfig(every=0),
        eval=EvalConfig(every=max(steps // 8, 1), max_batches=64),
        log=LogConfig(every=50, tensorboard=False),
    )


def active_parameters(config: TrainConfig) -> int:
    return ModelSpec.from_config(config, VOCAB).count_parameters()[1]


def dense_twin(config: TrainConfig) -> TrainConfig:
    """The dense model whose active parameters come nearest to the MoE's."""

    def dense(d_hidden: int) -> TrainConfig:
        return dataclasses.replace(
            config, model=dataclasses.replace(config.model, moe_layers="none", d_hidden=d_hidden)
        )

    target = active_parameters(config)
    widths = range(8, 8 * config.model.d_model, 4)
    return dense(min(widths, key=lambda width: abs(active_parameters(dense(width)) - target)))


def run(config: TrainConfig, workdir: pathlib.Path) -> list[tuple[int, float, float]]:
    """(step, training seconds so far, evaluation loss) of every evaluation."""
    train(dataclasses.replace(config, workdir=str(workdir)), workdir.name)
    seconds, last, points = 0.0, 0, []
    for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()):
        if "eval/loss" in line:
            points.append((line["step"], seconds, line["eval/loss"]))
        elif line["step"] > 1:  # the first step holds the compilation
            seconds, last = seconds + line["step_seconds"] * (line["step"] - max(last, 1)), line["step"]
    return points


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    keep_freed_memory()
    configs = {"MoE": moe_config(steps)}
    configs["dense"] = dense_twin(configs["MoE"])
    with tempfile.TemporaryDirectory() as folder:
        points = {name: run(config, pathlib.Path(folder) / name) for name, config in configs.items()}
        (_, moe_seconds, _), (_, budget, dense_end) = points["MoE"][-1], points["dense"][-1]
        short_steps = max(round(steps * budget / moe_seconds), 1)
        short = run(moe_config(short_steps), pathlib.Path(folder) / "short")
    counts = {
        name: ModelSpec.from_config(config, VOCAB).count_parameters() for name, config in configs.items()
    }
    rows = [
        [step, f"{moe:.4f}", f"{dense:.4f}", f"{dense - moe:+.4f}", f"{moe_s:.0f}", f"{dense_s:.0f}"]
        for (step, moe_s, moe), (_, dense_s, dense) in zip(points["MoE"], points["dense"], strict=True)
    ]
    _, short_seconds, short_end = short[-1]
    equal_time = [
        ["dense", steps, f"{budget:.0f}", f"{dense_end:.4f}", ""],
        ["MoE", short_steps, f"{short_seconds:.0f}", f"{short_end:.4f}", f"{dense_end - short_end:+.4f}"],
    ]
    lines = [
        *(
            f"{name}: {total:,} parameters, {active:,} active per token."
            for name, (total, active) in counts.items()
        ),
        "",
        "At equal steps (evaluation loss in nats per byte; the last row is over the whole validation split, the others"
        " over a part of it; training seconds without compilation and evaluation):",
        "",
        environment.table(["step", "MoE", "dense", "dense - MoE", "MoE s", "dense s"], rows),
        "",
        "At equal training time (the MoE's schedule ends after as many steps as fit into the dense twin's time; whole"
        " validation split):",
        "",
        environment.table(["model", "steps", "seconds", "loss", "dense - MoE"], equal_time),
    ]
    environment.save("moe_vs_dense", "MoE against its dense twin", "\n".join(lines))


if __name__ == "__main__":
    main()
