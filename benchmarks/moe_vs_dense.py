"""Does MoE pay? The same steps on the same data, with experts and as a dense model of the same active parameters.

    python -m benchmarks.moe_vs_dense [--steps 2000]

Both train on the embedded corpus (the source of the Python standard library, bytes), one after the other on this
machine, and are evaluated on the whole validation split. The dense twin's hidden width is chosen such that a token
meets as many parameters as in the MoE. Their steps are timed beforehand, in turn, so that a machine that changes its
speed changes it for both. A third run is the MoE once more with as many steps as fit into the dense twin's training
time: its learning rate has come down when that time is over.
"""

import argparse
import dataclasses
import json
import pathlib
import tempfile

from benchmarks import environment
from benchmarks.twins import VOCAB, Compiled, dense_twin
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


def run(config: TrainConfig, workdir: pathlib.Path) -> dict[int, float]:
    """Evaluation loss by step."""
    train(dataclasses.replace(config, workdir=str(workdir)), workdir.name)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    steps = parser.parse_args().steps
    keep_freed_memory()
    configs = {"MoE": moe_config(steps)}
    configs["dense"] = dense_twin(configs["MoE"])
    step_ms = environment.milliseconds(
        {name: Compiled(config).step for name, config in configs.items()}, rounds=40
    )
    short_steps = max(round(steps * step_ms["dense"] / step_ms["MoE"]), 1)
    with tempfile.TemporaryDirectory() as folder:
        losses = {name: run(config, pathlib.Path(folder) / name) for name, config in configs.items()}
        short = run(moe_config(short_steps), pathlib.Path(folder) / "short")[short_steps]
    counts = {
        name: ModelSpec.from_config(config, VOCAB).count_parameters() for name, config in configs.items()
    }

    def seconds(name: str, steps: int) -> str:
        return f"{steps * step_ms[name] / 1e3:.0f}"

    rows = [
        [
            step,
            f"{moe:.4f}",
            f"{dense:.4f}",
            f"{dense - moe:+.4f}",
            seconds("MoE", step),
            seconds("dense", step),
        ]
        for (step, moe), dense in zip(losses["MoE"].items(), losses["dense"].values(), strict=True)
    ]
    dense_end = losses["dense"][steps]
    equal_time = [
        ["dense", steps, seconds("dense", steps), f"{dense_end:.4f}", ""],
        ["MoE", short_steps, seconds("MoE", short_steps), f"{short:.4f}", f"{dense_end - short:+.4f}"],
    ]
    lines = [
        *(
            f"{name}: {total:,} parameters, {active:,} active per token; {step_ms[name]:.0f} ms per step."
            for name, (total, active) in counts.items()
        ),
        "",
        "At equal steps (evaluation loss in nats per byte; the last row is over the whole validation split, the others"
        " over a part of it; seconds of training alone, from the time of a step):",
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
