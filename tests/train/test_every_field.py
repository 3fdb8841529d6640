"""Two steps with every field of the config away from its default: options that nobody turns on break unseen.

A field that is in none of the runs fails the test, so a new one needs a value here.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from tests.train import small
from train import cli
from train.config import TrainConfig
from train.config_io import load_config
from train.errors import ConfigError
from train.fields import flatten, override
from train.program import make_program
from train.validation import resolve_mesh, validate

SMALL = {
    "steps": 2,
    "data.batch_size": 8,
    "data.sequence_length": 16,
    "model.d_model": 16,
    "model.num_heads": 2,
    "model.moe.d_hidden": 8,
}

# From the command line to the run's directory, on the eight devices of the tests.
WHOLE_RUN = SMALL | {
    "seed": 3,
    "data.validation_fraction": 0.2,
    "data.text_field": "body",
    "data.tokenizer": "char",
    "model.num_layers": 2,
    "model.num_kv_heads": 1,
    "model.d_hidden": 24,
    "model.activation": "gelu",
    "model.moe_layers": "odd",
    "model.vocab_size": 40,
    "model.tie_embeddings": False,
    "model.rope_theta": 500.0,
    "model.loss_chunk": 8,
    "model.moe.num_experts": 4,
    "model.moe.top_k": 3,
    "model.moe.exchange": "all_gather",
    "model.moe.overflow": "drop",
    "model.moe.capacity_factor": 1.5,
    "model.moe.wire": "bf16",
    "model.moe.expert_bias": True,
    "model.moe.shared_experts": 1,
    "optimizer.learning_rate": 2e-3,
    "optimizer.schedule": "wsd",
    "optimizer.warmup_steps": 1,
    "optimizer.decay_fraction": 0.5,
    "optimizer.final_fraction": 0.5,
    "optimizer.b1": 0.8,
    "optimizer.b2": 0.9,
    "optimizer.weight_decay": 0.2,
    "model.moe.shared_hidden": 12,
    "model.moe.shared_gate": True,
    "optimizer.clip_norm": 0.5,
    "optimizer.accumulation_steps": 2,
    "mesh.data": 2,
    "mesh.expert": 2,
    "mesh.tensor": 2,
    "checkpoint.every": 2,
    "checkpoint.every_minutes": 60,
    "checkpoint.wait": True,
    "checkpoint.on_nan": "skip",
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 2,
    "eval.every": 2,
    "eval.max_batches": 1,
    "log.every": 1,
    "log.experts_every": 1,
    "log.dead_after": 1,
    "log.drop_limit": 0.9,
    "log.spike_factor": 5.0,
    "log.stall_factor": 50.0,
    "log.stall_seconds": 600.0,
    "log.tensorboard": False,
}
PATHS = {"data.path": "train.jsonl", "data.validation_path": "validation.jsonl", "workdir": "run"}
# Every option of a router, each in a layer with a router that has it, on one device.
LAYER_ROUTERS = "noisy gshard switch sigmoid sinkhorn hash one cosine swipe topology rounded".split()
ROUTING = SMALL | {
    "model.num_layers": len(LAYER_ROUTERS),
    "model.moe.router": "expert_choice",
    "model.moe.layer_routers": ",".join(f"{layer}:{name}" for layer, name in enumerate(LAYER_ROUTERS)),
    "model.moe.layer_experts": "5:4",
    **{
        f"model.moe.routing.{name}": value
        for name, value in {
            "balance_weight": 0.02,
            "balance_over": "sequence",
            "z_weight": 0.002,
            "importance_weight": 0.03,
            "load_weight": 0.04,
            "orthogonality_weight": 0.05,
            "normalize": False,
            "router_bias": True,
            "groups": 2,
            "capacity_factor": 1.5,
            "eval_capacity_factor": 3.0,
            "drop_by": "score",
            "jitter": 0.1,
            "random_second": False,
            "bias_rate": 0.02,
            "expert_groups": 4,
            "limit_groups": 2,
            "scale": 2.5,
            "max_experts": 3,
            "iterations": 4,
            "hash_seed": 7,
            "expert": 1,
            "projection": 6,
            "devices": 2,
            "budget_factor": 1.5,
            "nodes": 2,
            "off_node_share": 0.3,
            "tile": 4,
            "rounding": "up",
        }.items()
    },
}
# What asks for layouts of its own, on four devices.
SPLIT = SMALL | {
    "precision": "bf16",
    "model.num_layers": 1,
    "model.remat": "dots",
    "model.moe.overflow": "drop",
    "model.moe.chunks": 2,
    "model.moe.shadow": 1,
    "model.moe.received": "resend",
    "optimizer.name": "muon",
    "optimizer.adam_learning_rate": 5e-4,
    "optimizer.muon_iterations": 1,
    "mesh.fsdp": True,
    "mesh.data": 2,
    "mesh.expert_node": 2,
}

# What no compiled program knows, since the host does it; `mesh.data` is by default what the other axes leave.
ON_THE_HOST = {*PATHS, "mesh.data", "data.validation_fraction", "data.text_field", "data.tokenizer"} | {
    f"{group}.{name}"
    for group, names in {
        "checkpoint": "every every_minutes wait keep_last keep_best",
        "eval": "every max_batches",
        "log": "every experts_every drop_limit spike_factor stall_factor stall_seconds tensorboard",
    }.items()
    for name in names.split()
}
VALUES = ROUTING | SPLIT | WHOLE_RUN
VALUES |= {
    "model.moe.layer_experts": "1:16",
    "model.moe.layer_routers": "1:hash",
}  # of a layer that every run has
OTHER = {"model.moe.routing.expert_groups": 2}  # instead of the default, which allows no `limit_groups`
# Runs in which a field may show, with their devices.
ONE_LAYER = SMALL | {"model.num_layers": 1}
GROUPS = {name: ROUTING[name] for name in ROUTING if name.endswith("_groups")}
RUNS = [(WHOLE_RUN, 8), (SPLIT, 4), (SMALL, 1), (SMALL, 2), (ONE_LAYER | GROUPS, 1)]
RUNS += [(ONE_LAYER | {"model.moe.router": router}, 1) for router in (*LAYER_ROUTERS, "expert_choice")]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The run's directory."""
    folder = tmp_path_factory.mktemp("every-field")
    text = small.write_text(folder / "text.txt").read_text()
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for _ in range(4)))
    config = small.write_config(folder / "defaults.py", TrainConfig())
    options = [f"--{name}={value}" for name, value in WHOLE_RUN.items()]
    options += [f"--{name}={folder / path}" for name, path in PATHS.items()]
    assert cli.main(["train", str(config), *options]) == 0
    return folder / "run"


def configured(fields, num_devices):
    """The config with some fields, as the command line would make it."""
    config = override(TrainConfig(), {name: str(value) for name, value in fields.items()})
    validate(config, num_devices)
    return config


def away_from_default(config):
    default = flatten(TrainConfig())
    return {name for name, value in flatten(config).items() if value != default[name]}


def test_no_field_is_left_out():
    configs = configured(WHOLE_RUN, 8), configured(ROUTING, 1), configured(SPLIT, 4)
    assert set().union(PATHS, *map(away_from_default, configs)) == set(flatten(TrainConfig()))


@pytest.mark.landing
def test_a_whole_run_does_what_its_fields_say(whole_run):
    config = flatten(load_config(whole_run / "config.yaml"))
    assert {name: config[name] for name in WHOLE_RUN} == WHOLE_RUN
    assert config["data.validation_path"] == str(whole_run.parent / "validation.jsonl")
    lines = small.read_metrics(whole_run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2] and all(np.isfinite(line["loss"]) for line in steps)
    assert [line["step"] for line in lines if "eval/loss" in line] == [2]
    assert [line["learning_rate"] for line in steps] == pytest.approx([2e-3, 2e-3])
    assert any("moe/layer" in name or "expert" in name for name in steps[0])
    assert [path.name for path in (whole_run / "checkpoints").iterdir() if path.is_dir()] == ["2"]
    assert not (whole_run / "tensorboard").exists()


@functools.cache
def programs(items, num_devices):
    """Everything that is compiled for a run, as text; None if the config is refused."""
    try:
        config = configured(dict(items), num_devices)
    except ConfigError:
        return None
    axes = resolve_mesh(config.mesh, num_devices)
    sizes = {name: getattr(axes, name) for name in ("data", "expert_node", "expert", "tensor")}
    mesh = moejax.make_mesh(**sizes, devices=jax.devices()[:num_devices])
    program = make_program(config, small.VOCAB, mesh)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, small.random_batch(config, 0)))
    with jax.set_mesh(mesh):
        state = program.abstract_state
        lowered = program.init.lower(), program.train_step.lower(state, batch)
        return [stage.as_text() for stage in (*lowered, program.eval_step.lower(state.params, batch))]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(flatten(TrainConfig())) - ON_THE_HOST))
def test_a_field_changes_what_is_compiled(name):
    """In one of the runs that may have it; those that do have it come first."""
    allowed = 0
    for fields, num_devices in sorted(RUNS, key=lambda run: name not in run[0]):
        fields = fields | {"steps": 12}  # in two steps, many schedules are the same
        others = {other: value for other, value in fields.items() if other != name}
        if name in OTHER:
            others[name] = OTHER[name]
        pair = [
            programs(tuple(sorted(f.items())), num_devices) for f in (others, others | {name: VALUES[name]})
        ]
        allowed += None not in pair
        if None not in pair and pair[0] != pair[1]:
            return
    pytest.fail(f"{allowed} runs may have it, and it does nothing")


@pytest.mark.landing
def test_what_the_host_does_changes_nothing_that_is_compiled():
    others = {name: value for name, value in WHOLE_RUN.items() if name not in ON_THE_HOST}
    given = WHOLE_RUN | {name: "there" for name in PATHS}
    assert ON_THE_HOST <= given.keys()
    without, texts = (programs(tuple(sorted(fields.items())), 8) for fields in (others, given))
    assert texts is not None and texts == without


def two_steps(fields, num_devices, **axes):
    """Losses of two steps on one batch, and the program's state behind them."""
    config = configured(fields, num_devices)
    run = small.Steps(config, **axes)
    batch = small.random_batch(config, 0)
    return [run.take(batch) for _ in range(2)], run


@pytest.mark.landing  # eleven different layers in one program
def test_every_option_of_every_router_takes_two_steps():
    metrics, run = two_steps(ROUTING, 1)
    assert all(np.isfinite(float(step["loss"])) for step in metrics)
    assert float(metrics[1]["loss"]) != float(metrics[0]["loss"])
    layers = run.spec.moe_of_layers()
    routers = [layer.router for layer in layers]
    assert [layer.num_experts for layer in layers] == [8] * 5 + [4] + [8] * 5
    given = {name.rpartition(".")[2]: value for name, value in ROUTING.items() if ".routing." in name}
    for layer in layers:
        assert layer.balance_weight == given["balance_weight"] and layer.balance_over == "sequence"
    # What the routers have of their options; those that a router keeps under another name are in `test_routing.py`.
    found = {
        name for router in routers for name, value in given.items() if getattr(router, name, None) == value
    }
    kept_by_name = (
        "jitter random_second bias_rate scale max_experts iterations hash_seed expert devices budget_factor nodes "
        "off_node_share tile rounding groups normalize"
    )
    assert found >= set(kept_by_name.split())


@pytest.mark.landing
def test_parameters_split_over_data_in_bf16_take_two_steps():
    metrics, run = two_steps(SPLIT, 4, data=2, expert_node=2)
    assert all(np.isfinite(float(step["loss"])) for step in metrics)
    split = [leaf for leaf in jax.tree.leaves(run.state.params) if "data" in str(leaf.sharding.spec)]
    assert split and run.spec.moe_of_layers()[0].experts.dtype == jnp.bfloat16
