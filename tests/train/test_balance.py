"""Routers in training: their state, their options in the config, what is measured and warned about."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from matplotlib import image

from moejax.routing import ROUTERS, router_options
from tests import tolerance
from tests.train import small
from train.config import LogConfig, MoEConfig, OptimizerConfig, RoutingConfig, TrainConfig
from train.errors import ConfigError
from train.fields import override
from train.metrics import Metrics, read
from train.tensorboard import Board, png
from train.validation import LOSSES, validate
from train.watch import ExpertWatch


def run_with(router, accumulation=1, **routing):
    run = small.config(
        optimizer=OptimizerConfig(warmup_steps=50, accumulation_steps=accumulation),
        log=LogConfig(every=1, dead_after=2, tensorboard=False),
    )
    moe = MoEConfig(num_experts=8, d_hidden=8, router=router, routing=RoutingConfig(**routing))
    return dataclasses.replace(run, model=dataclasses.replace(run.model, moe=moe))


def biases(params):
    """[M, E]; the two layers of the small model are alike, so they are stacked."""
    return np.asarray(params["blocks"][0]["ffn"]["router"]["selection_bias_E"])


def bias_after(steps, layout, accumulation=1):
    """The selection bias after some steps, what it should be by their loads, and the trainer."""
    run = run_with("sigmoid", accumulation, bias_rate=0.01)
    trainer, expected = small.Steps(run, *layout), np.zeros((2, 8), np.float32)
    for seed in range(steps):
        load = np.asarray(trainer.take(small.random_batch(run, seed))["moe/layers/load"])
        assert load.sum() == 2 * 2 * (8 * 16 - 3), "the load of the whole batch, in two layers"
        expected += np.float32(0.01) * np.sign(load.mean(axis=1, keepdims=True) - load).astype(np.float32)
    return biases(trainer.state.params), expected, trainer


@pytest.mark.landing
def test_selection_bias_follows_the_load_and_nothing_else():
    bias, expected, trainer = bias_after(3, (2, 4))
    np.testing.assert_array_equal(bias, expected)
    assert np.abs(bias).max() > 0.02, "it moved"
    moments = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.state.opt_state)
        if "selection_bias_E" in jax.tree_util.keystr(path)
    ]
    assert len(moments) == 2 and not any(np.any(moment) for moment in moments), "no gradient ever came"


@pytest.mark.slow
def test_selection_bias_is_the_same_on_every_layout_and_with_accumulation():
    alone = bias_after(3, (1, 1))[0]
    for layout, accumulation in (((2, 4), 1), ((1, 2), 4)):
        np.testing.assert_array_equal(bias_after(3, layout, accumulation)[0], alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("router", "routing"),
    [
        ("noisy", {"balance_weight": 0.01}),
        ("gshard", {"groups": 2}),
        ("switch", {"groups": 4, "capacity_factor": 1.0}),
        (
            "sigmoid",
            {"expert_groups": 4, "limit_groups": 2, "balance_weight": 1e-3, "balance_over": "sequence"},
        ),
        ("expert_choice", {}),
        ("sinkhorn", {"groups": 2}),
        ("hash", {}),
        ("random", {}),
        ("one", {}),
        ("cosine", {}),
        ("swipe", {"devices": 4}),
        ("topology", {"nodes": 2}),
        ("rounded", {"tile": 8}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_router_trains_alike_on_devices(router, routing):
    run = run_with(router, **routing)
    sums, loads = [], []
    for layout in ((1, 1), (2, 4)):
        trainer = small.Steps(run, *layout)
        metrics = [trainer.take(small.random_batch(run, seed)) for seed in range(4)]
        sums.append([[float(m[name]) for name in ("loss", "aux_loss", "grad_norm")] for m in metrics])
        loads.append([np.asarray(m["moe/layers/load"]) for m in metrics])
    np.testing.assert_allclose(*sums, rtol=tolerance.F32_MODEL)
    np.testing.assert_array_equal(*loads)


def test_an_expert_is_dead_after_so_many_steps_without_a_token():
    run = run_with("one", expert=3)
    trainer = small.Steps(run)
    dead = [int(trainer.take(small.random_batch(run, 0))["moe/dead_experts"]) for _ in range(3)]
    assert dead == [0, 2 * 7, 2 * 7], "dead_after is 2; one expert of 8 in each of 2 layers gets everything"
    idle = np.asarray(trainer.state.idle_ME)
    assert (idle[:, 3] == 0).all() and (np.delete(idle, 3, axis=1) == 3).all()


def test_every_option_of_the_config_is_one_of_a_router():
    fields = {field.name for field in dataclasses.fields(RoutingConfig)} - set(LOSSES)
    assert fields == {option for name in ROUTERS for option in router_options(name)}


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"router": "sigmod"}, "model.moe.router = sigmod: must be one of topk, .*; the nearest is sigmoid"),
        (
            {"routing.jitter": "0.1"},
            "model.moe.routing.jitter = 0.1: router topk has no such option; its options: ",
        ),
        ({"router": "switch", "top_k": "2"}, "model.moe.top_k = 2: must be 1 for this router, or unset"),
        ({"router": "gshard", "top_k": "3"}, "model.moe.top_k = 3: must be 2 for this router, or unset"),
        ({"top_k": "999"}, r"model.moe.top_k = 999: must be between 1 and model.moe.num_experts \(8\)"),
        (
            {"num_experts": "1"},
            r"model.moe.top_k = unset \(2 for router topk\): must be between 1 and .* \(1\)",
        ),
        (
            {"router": "sigmoid", "routing.expert_groups": "3"},
            r"model.moe.routing.expert_groups = 3: must divide model.moe.num_experts \(8\)",
        ),
        (
            {"router": "switch", "routing.groups": "7"},
            r"model.moe.routing.groups = 7: must divide the tokens of a batch .*\(2048\)",
        ),
        (
            {"routing.load_weight": "0.1"},
            "model.moe.routing.load_weight = 0.1: must be 0 or unset: only router noisy",
        ),
        (
            {"router": "cosine", "routing.orthogonality_weight": "0.1"},
            "model.moe.routing.orthogonality_weight = 0.1: must be 0 or unset: .* not cosine",
        ),
        (
            {"layer_routers": "0:hash,9:hash"},
            "model.moe.layer_routers = 0:hash,9:hash: must be a list such as 0:hash,3:switch, of .* 0, 1, 2, 3",
        ),
        (
            {"layer_routers": "0:hush"},
            "model.moe.layer_routers = 0:hush: must name routers of topk, .*; the nearest is hash",
        ),
        ({"layer_routers": "0:hash,0:one"}, "model.moe.layer_routers = 0:hash,0:one: must name layer 0 once"),
        (
            {"layer_experts": "0:4,2:0"},
            "model.moe.layer_experts = 0:4,2:0: must give numbers of experts between",
        ),
        ({"layer_experts": "7:4"}, "model.moe.layer_experts = 7:4: must be a list such as 0:4,3:16, of .*"),
        (
            {"layer_experts": "0:4", "top_k": "6"},
            r"model.moe.top_k = 6: must be between 1 and model.moe.layer_experts \(4\)",
        ),
        (
            {"layer_experts": "0:4", "shadow": "6"},
            r"model.moe.shadow = 6: must be between 0 and model.moe.layer_experts \(0:4\), or auto",
        ),
        (
            {"layer_routers": "0:hash", "routing.jitter": "0.1"},
            "model.moe.routing.jitter = 0.1: router topk, hash has no such option; its options: ",
        ),
        (
            {"router": "switch", "routing.capacity_factor": "0"},
            "model.moe.routing.capacity_factor = 0.0: must be",
        ),
    ],
    ids=str,
)
def test_bad_router_options_are_named(fields, error):
    config = override(TrainConfig(), {f"model.moe.{name}": value for name, value in fields.items()})
    with pytest.raises(ConfigError, match=f"^{error}"):
        validate(config, 1)


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_is_a_choice_of_the_config(router):
    validate(override(TrainConfig(), {"model.moe.router": router}), 1)


class TestExpertWatch:
    EVEN = ((5, 5, 5, 5), (5, 5, 5, 5))
    SKEWED = ((97, 1, 1, 1), (5, 5, 5, 5))

    def look(self, watch, step, load, dead=((0,) * 4,) * 2, dropped=0.0, invalid=0):
        load = np.asarray(load, float)
        share = load / load.sum(axis=1, keepdims=True)
        entropy = -np.sum(share * np.log(share), axis=1) / np.log(load.shape[1])
        layers = {"load": load, "load_entropy": entropy, "dead": np.asarray(dead)}
        return list(watch(step, {"moe/dropped_fraction": dropped, "moe/invalid": invalid}, layers))

    def test_says_each_thing_once_until_it_has_ended(self):
        watch = ExpertWatch(0.1, 50)
        assert self.look(watch, 1, self.EVEN) == []
        (warning,) = self.look(watch, 2, self.SKEWED)
        assert (
            "MoE layer 0 one expert has 97% of the choices; raise model.moe.routing.balance_weight" in warning
        )
        assert self.look(watch, 3, self.SKEWED) == []
        assert self.look(watch, 4, self.EVEN) == []
        assert len(self.look(watch, 5, self.SKEWED)) == 1

    def test_names_dead_experts_drops_and_invalid_ids(self):
        watch, two = ExpertWatch(0.1, 50), ((0, 1, 0, 0), (0, 0, 0, 1))
        (dead,) = self.look(watch, 1, self.EVEN, dead=two)
        assert "no token for 50 steps: expert 1 of MoE layer 0, expert 3 of MoE layer 1; raise" in dead
        assert self.look(watch, 2, self.EVEN, dead=two) == []
        (another,) = self.look(watch, 3, self.EVEN, dead=((1, 1, 0, 0), (0, 0, 0, 1)))
        assert "expert 0 of MoE layer 0;" in another and "expert 1" not in another
        drops, invalid = self.look(watch, 4, self.EVEN, dropped=0.25, invalid=3)
        assert "25.0% of the choices are dropped" in drops and "most of them by the router; raise" in drops
        assert "3 expert ids that do not exist" in invalid


def test_numbers_of_layers_are_lists_in_the_metrics(tmp_path):
    metrics = Metrics(tmp_path / "m")
    load = np.array([[1, 2], [3, 4]], np.int32)
    metrics.append({"step": 1, "moe/layers/load": load, "moe/layers/z": np.array([0.1, np.nan], np.float32)})
    metrics.close()
    (line,) = read(tmp_path / "m")
    assert line["moe/layers/load"] == load.tolist()
    assert line["moe/layers/z"][0] == float(np.float32(0.1)) and np.isnan(line["moe/layers/z"][1])


def test_load_is_a_picture_and_histograms_in_tensorboard(tmp_path):
    board = Board(tmp_path, 0)
    board.write_load(3, np.array([[4, 0, 2, 2], [2, 2, 2, 2]]))
    board.close()
    from tensorboardX.proto.event_pb2 import Event  # only once the board has found it to be there

    (file,) = tmp_path.iterdir()
    content, events = file.read_bytes(), []
    while content:  # length, its checksum, the event, its checksum
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    values = {value.tag: value for event in events if event.step == 3 for value in event.summary.value}
    assert set(values) == {"moe/load", "moe/load_share/0", "moe/load_share/1"}
    assert values["moe/load_share/0"].histo.max == 2 and values["moe/load_share/1"].histo.num == 4
    picture = image.imread(io.BytesIO(values["moe/load"].image.encoded_image_string))
    assert picture.shape[:2] == (24, 48)
    np.testing.assert_allclose(picture[::12, ::12], [[0, 1, 0.5, 0.5], [0.5] * 4], atol=0.01)


def test_png_of_one_pixel():
    np.testing.assert_allclose(image.imread(io.BytesIO(png(np.array([[51]], np.uint8)))), [[0.2]])
