from typing import Literal

import pytest

from train.config import MeshConfig, TrainConfig
from train.config_io import find_config
from train.errors import ConfigError
from train.fields import leaf_types, override
from train.layers import moe_layer_numbers
from train.validation import RANGES, resolve_mesh, validate


def test_every_number_of_the_config_has_a_range():
    numbers = {int, float, int | None, float | None, int | Literal["auto"]}
    assert {*RANGES, "model.moe.top_k"} == {
        name for name, annotation in leaf_types(TrainConfig).items() if annotation in numbers
    }


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, annotation in leaf_types(TrainConfig).items()
        if annotation in (int, int | None, int | Literal["auto"])
    ],
)
def test_every_integer_is_bounded(name):
    with pytest.raises(ConfigError, match=f"{name} = {10**20}: must be between"):
        validate(override(TrainConfig(), {name: str(10**20)}), 8)


def test_defaults_and_shipped_configs_are_valid():
    validate(TrainConfig(), 1)
    validate(TrainConfig(), 8)
    for name, num_devices in (("quickstart", 1), ("quickstart", 8), ("shakespeare", 1), ("moe_1b_64x", 8)):
        validate(find_config(name)[0], num_devices)


# What is set, and how the error begins and goes on.
BROKEN = [
    ("steps=0", "steps = 0: must be between 1 and 2147483647"),
    ("steps=100000000000000000000", "steps = 100000000000000000000: must be between 1 and 2147483647"),
    ("model.d_model=10000000", "model.d_model = 10000000: must be between 1 and 1048576"),
    ("mesh.data=4294967296", "mesh.data = 4294967296: must be between 1 and 1048576, or -1"),
    ("model.moe.top_k=0", "model.moe.top_k = 0: must be between 1 and model.moe.num_experts (8)"),
    (
        "model.moe.top_k=-1 model.moe_layers=none",
        "model.moe.top_k = -1: must be between 1 and model.moe.num_experts (8)",
    ),
    ("seed=-1", "seed = -1: must be between 0 and"),
    ("seed=4294967296", "seed = 4294967296: must be between 0 and"),
    ("workdir=", "workdir = '': must not be empty"),
    ("data.path=", "data.path = '': must not be empty"),
    ("data.batch_size=-16", "data.batch_size = -16: must be between 1 and"),
    ("data.sequence_length=0", "data.sequence_length = 0: must be between 1 and"),
    (
        "data.validation_fraction=1",
        "data.validation_fraction = 1.0: must be between 0 and 1, neither of them",
    ),
    ("data.validation_fraction=nan", "data.validation_fraction = nan: must be between"),
    ("optimizer.learning_rate=0", "optimizer.learning_rate = 0.0: must be a positive finite number"),
    ("optimizer.learning_rate=-1", "optimizer.learning_rate = -1.0: must be a positive finite number"),
    ("optimizer.learning_rate=nan", "optimizer.learning_rate = nan: must be a positive finite number"),
    ("optimizer.learning_rate=inf", "optimizer.learning_rate = inf: must be a positive finite number"),
    ("optimizer.adam_learning_rate=0", "optimizer.adam_learning_rate = 0.0: must be a positive"),
    ("optimizer.b2=1", "optimizer.b2 = 1.0: must be at least 0 and below 1"),
    ("optimizer.decay_fraction=1.5", "optimizer.decay_fraction = 1.5: must be between 0 and 1"),
    ("optimizer.weight_decay=-0.1", "optimizer.weight_decay = -0.1: must be a finite number of at least 0"),
    ("optimizer.warmup_steps=-1", "optimizer.warmup_steps = -1: must be between 0 and"),
    ("model.moe.routing.z_weight=inf", "model.moe.routing.z_weight = inf: must be a finite number"),
    ("model.num_heads=3", "model.num_heads = 3: must divide model.d_model (128)"),
    ("model.d_model=12", "model.num_heads = 4: must leave an even width per head"),
    ("model.num_kv_heads=3", "model.num_kv_heads = 3: must divide model.num_heads (4)"),
    ("model.num_kv_heads=8", "model.num_kv_heads = 8: must divide model.num_heads (4)"),
    ("model.moe_layers=1,4", "model.moe_layers = 1,4: must be all, none, odd, even, or"),
    ("model.moe_layers=some", "model.moe_layers = some: must be all, none"),
    ("model.moe.top_k=999", "model.moe.top_k = 999: must be between 1 and model.moe.num_experts (8)"),
    ("model.moe.num_experts=1", "model.moe.top_k = unset (2 for router topk): must be between 1 and"),
    ("model.moe.router=tpk", "model.moe.router = tpk: must be one of topk, noisy, "),
    ("model.moe.exchange=ring", "model.moe.exchange = ring: must be one of all_to_all"),
    ("mesh.expert=3", "mesh.expert = 3: must divide the number of devices (8): 1, 2, 4, 8"),
    ("mesh.expert=16", "mesh.expert = 16: must divide the number of devices (8)"),
    ("mesh.data=0", "mesh.data = 0: must be between 1 and 1048576, or -1"),
    (
        "mesh.expert=8 model.moe.num_experts=12",
        "model.moe.num_experts = 12: must be divisible by mesh.expert (8)",
    ),
    (
        "mesh.expert=2 mesh.expert_node=3",
        "mesh.expert_node = 3: must divide the number of devices left by the other axes (4): 1, 2, 4",
    ),
    (
        "mesh.data=2 mesh.expert=2 mesh.expert_node=4",
        "mesh.data = 2: mesh.data × mesh.expert_node × mesh.expert (2 × 4 × 2 = 16) must equal the number of "
        "devices (8); with mesh.expert_node = 4 and mesh.expert = 2, mesh.data must be 1 or -1",
    ),
    (
        "mesh.expert=4 mesh.tensor=4",
        "mesh.tensor = 4: must divide the number of devices left by the other axes (2): 1, 2",
    ),
    ("mesh.tensor=8 model.moe.d_hidden=12", "model.moe.d_hidden = 12: must be divisible by mesh.tensor (8)"),
    (
        "mesh.fsdp=true model.d_model=132 model.num_heads=2",
        "mesh.fsdp = True: needs model.d_model (132) to be divisible by",
    ),
    (
        "mesh.tensor=8 model.moe.shared_experts=1 model.moe.shared_hidden=12",
        "model.moe.shared_hidden = 12: must be divisible by mesh.tensor (8)",
    ),
    (
        "model.moe.shared_hidden=12",
        "model.moe.shared_hidden = 12: needs model.moe.shared_experts of at least 1",
    ),
    (
        "model.moe.shared_gate=true",
        "model.moe.shared_gate = True: needs model.moe.shared_experts of at least 1",
    ),
    ("model.moe.shadow=9", "model.moe.shadow = 9: must be between 0 and model.moe.num_experts (8), or auto"),
    ("model.moe.capacity_factor=0", "model.moe.capacity_factor = 0.0: must be a positive finite number"),
    (
        "mesh.expert=2 mesh.expert_node=4 model.moe.num_experts=12",
        "model.moe.num_experts = 12: must be divisible by mesh.expert_node × mesh.expert (4 × 2 = 8)",
    ),
    (
        "data.batch_size=20",
        "data.batch_size = 20: must be divisible by mesh.data × mesh.expert (8 × 1 = 8), such as 16 or 24",
    ),
    (
        "data.batch_size=8 optimizer.accumulation_steps=2",
        "data.batch_size = 8: must be divisible by optimizer.accumulation_steps × mesh.data × mesh.expert "
        "(2 × 8 × 1 = 16), such as 16",
    ),
]


@pytest.mark.parametrize(("settings", "message"), BROKEN, ids=[settings for settings, _ in BROKEN])
def test_a_broken_rule_names_field_value_and_what_is_allowed(settings, message):
    config = override(TrainConfig(), dict(setting.split("=", 1) for setting in settings.split()))
    with pytest.raises(ConfigError) as caught:
        validate(config, 8)
    assert str(caught.value).startswith(message)


def test_workdir_that_cannot_be_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"must be a directory, but .*file is a file"):
            validate(TrainConfig(workdir=str(workdir)), 1)


def test_a_dense_model_does_not_need_its_unused_experts_to_divide():
    texts = {"model.moe_layers": "none", "mesh.expert": "8", "model.moe.num_experts": "3"}
    validate(override(TrainConfig(), texts), 8)


def test_a_router_brings_its_own_top_k():
    validate(override(TrainConfig(), {"model.moe.router": "switch", "model.moe.num_experts": "1"}), 1)


@pytest.mark.parametrize(
    ("data", "expert_node", "expert", "num_devices", "resolved"),
    [
        (-1, 1, 1, 8, 8),
        (-1, 1, 4, 8, 2),
        (2, 1, 4, 8, 2),
        (1, 1, 1, 1, 1),
        (-1, 1, 6, 6, 1),
        (-1, 2, 2, 8, 2),
    ],
)
def test_mesh_takes_all_devices(data, expert_node, expert, num_devices, resolved):
    mesh = resolve_mesh(MeshConfig(data, expert_node, expert), num_devices)
    assert mesh == MeshConfig(resolved, expert_node, expert)


@pytest.mark.parametrize(("data", "expert"), [(2, 2), (4, 4), (3, 2)])
def test_mesh_that_leaves_devices_unused_or_asks_for_more(data, expert):
    with pytest.raises(
        ConfigError, match=rf"must equal the number of devices \(8\).*mesh.data must be {8 // expert}"
    ):
        resolve_mesh(MeshConfig(data, expert=expert), 8)


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("all", (0, 1, 2, 3, 4)),
        ("none", ()),
        ("odd", (1, 3)),
        ("even", (0, 2, 4)),
        ("3,1", (1, 3)),
        ("4", (4,)),
    ],
)
def test_moe_layer_numbers(text, numbers):
    assert moe_layer_numbers(text, 5) == numbers


@pytest.mark.parametrize("text", ["5", "-1", "1,1", "1,,2", "", "ALL"])
def test_moe_layer_numbers_refuses(text):
    with pytest.raises(ConfigError, match=r"model\.moe_layers = .*layer numbers from 0 to 4"):
        moe_layer_numbers(text, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data.batch_size": "2000000000"}, r"data.batch_size = 2000000000: times data.sequence_length"),
        (
            {"model.d_model": "1048576", "model.moe.d_hidden": "1048576"},
            r"model.d_hidden = 2796208: times model.d_model \(1048576\) and 2 must be at most 2147483647",
        ),
        (
            {"model.moe.num_experts": "1048576", "model.moe.d_hidden": "100000"},
            r"model.moe.d_hidden = 100000: times experts of a device \(1048576\), model.d_model \(128\) and 2",
        ),
        (
            {"model.moe.shared_experts": "1000000"},
            r"model.moe.shared_experts = 1000000: times model.moe.d_hidden \(176\), model.d_model \(128\) and 2",
        ),
        (
            {"model.moe.shared_experts": "1", "model.d_model": "1024", "model.moe.shared_hidden": "1048576"},
            r"model.moe.shared_hidden = 1048576: times model.d_model \(1024\) and 2 must be",
        ),
    ],
)
def test_sizes_beyond_32_bits(fields, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        validate(override(TrainConfig(), fields), 1)


def test_widths_that_the_tensor_axis_does_not_divide():
    three = {"mesh.tensor": "3", "data.batch_size": "3"}
    with pytest.raises(
        ConfigError, match=r"^model.moe.d_hidden = 176: must be divisible by mesh.tensor \(3\)"
    ):
        validate(override(TrainConfig(), three), 3)
    with pytest.raises(ConfigError, match=r"^model.d_hidden = 344: must be divisible by mesh.tensor \(3\)"):
        validate(override(TrainConfig(), three | {"model.moe_layers": "none"}), 3)
    # The experts' width is nobody's here.
    dense = three | {"model.moe_layers": "none", "model.d_hidden": "342", "model.moe.d_hidden": "128"}
    validate(override(TrainConfig(), dense), 3)
