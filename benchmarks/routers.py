"""Every router on the quickstart model: what it learns in 300 steps, how evenly, and what it drops.

    python -m benchmarks.routers [NAME ...] [--runs runs/routers]

Each run is `moejax train configs/quickstart.py --steps 300 --model.moe.router NAME` with the options of the table, one
after the other; one that is finished is not run again, one that was stopped goes on. The page is written after each
run, of all that are there. Evaluation is over the whole validation split.
"""

import argparse
import dataclasses
import json
import pathlib

import numpy as np

from benchmarks import environment
from configs import quickstart
from train.config import EvalConfig, LogConfig, RoutingConfig, TrainConfig
from train.loop import train
from train.memory import keep_freed_memory

STEPS = 300
LAST = 100  # steps of training over which balance and drops are averaged
# name of the run -> (router, options)
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "topk": ("topk", {}),
    "sigmoid": ("sigmoid", {}),
    "sigmoid-loss": ("sigmoid", {"bias_rate": 0.0, "balance_weight": 0.01}),
    "topk-alone": ("topk", {"balance_weight": 0.0}),
    "noisy": ("noisy", {}),
    "gshard": ("gshard", {}),
    "switch": ("switch", {}),
    "expert_choice": ("expert_choice", {}),
    "sinkhorn": ("sinkhorn", {}),
    "cosine": ("cosine", {}),
    "swipe": ("swipe", {"devices": 4}),
    "topology": ("topology", {"nodes": 2}),
    "rounded": ("rounded", {"tile": 128}),
    "hash": ("hash", {}),
    "random": ("random", {}),
    "one": ("one", {}),
}


def case(name: str, workdir: pathlib.Path) -> TrainConfig:
    router, options = CASES[name]
    run = quickstart.config()
    moe = dataclasses.replace(run.model.moe, router=router, routing=RoutingConfig(**options))
    return dataclasses.replace(
        run,
        steps=STEPS,
        workdir=str(workdir),
        model=dataclasses.replace(run.model, moe=moe),
        eval=EvalConfig(every=LAST, max_batches=16),
        log=LogConfig(every=1, experts_every=20, tensorboard=False),
    )


def lines_of(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_finished(workdir: pathlib.Path) -> bool:
    return any(line["step"] == STEPS and "eval/loss" in line for line in lines_of(workdir))


def row(name: str, workdir: pathlib.Path) -> list[object]:
    router, options = CASES[name]
    lines = lines_of(workdir)
    end = next(line for line in lines if line["step"] == STEPS and "eval/loss" in line)
    late = [line for line in lines if "loss" in line and line["step"] > STEPS - LAST]
    mean = lambda field: np.mean([line[field] for line in late])  # noqa: E731
    text = ", ".join(f"{option} {value}" for option, value in options.items())
    return [
        f"`{router}`" + (f" ({text})" if text else ""),
        f"{end['eval/loss']:.4f}",
        f"{end['eval/moe/max_vio']:.2f}",
        f"{mean('moe/max_vio'):.2f}",
        f"{mean('moe/dropped_fraction'):.1%}",
        f"{end['eval/moe/dropped_fraction']:.1%}",
        late[-1]["moe/dead_experts"],
        f"{end['eval/moe/changed']:.0%}",
        f"{1e3 * np.median([line['step_seconds'] for line in late]):.0f}",
    ]


def write_page(runs: pathlib.Path) -> None:
    rows = [row(name, runs / name) for name in CASES if is_finished(runs / name)]
    rows.sort(key=lambda cells: str(cells[1]))
    header = ["router", "eval loss", "MaxVio, evaluation", "MaxVio, batch", "dropped", "dropped, evaluation"]
    header += ["dead experts", f"changed in {LAST} steps", "ms per step"]
    text = (
        f"{STEPS} steps of the quickstart (4 MoE layers of 8 experts, 2,048 bytes per step, Muon), one seed each. Loss"
        " in nats per byte over the whole validation split (1.28 million bytes). MaxVio is that of the worst layer: at"
        f" the end over the whole validation split, and in training over each single batch, mean of the last {LAST}"
        " steps. Dropped: share of the choices in those steps, and in evaluation. Changed: share of 2,048 validation"
        f" tokens whose first choice is another one than {LAST} steps earlier, mean of the layers. `switch` and `one`"
        " choose one expert per token, the others two. `expert_choice` sees later tokens: its loss is not that of a"
        " language model. The machine was shared: milliseconds are only a hint."
    )
    environment.save("routers", "Routers on the quickstart", f"{text}\n\n{environment.table(header, rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/routers"))
    arguments = parser.parse_args()
    keep_freed_memory()
    for name in arguments.names or CASES:
        if not is_finished(arguments.runs / name):
            train(case(name, arguments.runs / name), name)
        write_page(arguments.runs)


if __name__ == "__main__":
    main()
