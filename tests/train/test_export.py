"""What `moejax export` writes is what the checkpoint holds, and nothing is written when something is wrong."""

import jax
import numpy as np
import pytest

from tests.train import launching
from train import cli
from train.config import CheckpointConfig
from train.config_io import load_config
from train.data import load_tokenizer
from train.evaluate import restore_params
from train.model import ModelSpec

safetensors = pytest.importorskip("safetensors.numpy")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run of four layers, of which the odd ones are MoE."""
    folder = tmp_path_factory.mktemp("export")
    config = launching.write_config(folder, steps=1, checkpoint=CheckpointConfig())
    options = ("--model.num_layers", "4", "--model.moe_layers", "odd", "--workdir", str(folder / "run"))
    assert cli.main(["train", str(config), *options]) == 0
    return folder / "run"


def params_of(run_dir):
    config = load_config(run_dir / "config.yaml")
    spec = ModelSpec.from_config(config, load_tokenizer(run_dir).vocab_size)
    return jax.device_get(restore_params(run_dir, config, spec.abstract_params(None))[1])


def export(run_dir, *options):
    return cli.main(["export", str(run_dir), *map(str, options)])


@pytest.mark.landing
@pytest.mark.parametrize("layer", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_an_expert(run_dir, tmp_path, layer, capsys):
    assert export(run_dir, "--layer", layer, "--expert", 5, "--output", tmp_path / "e.safetensors") == 0
    read = safetensors.load_file(tmp_path / "e.safetensors")
    blocks = params_of(run_dir)["blocks"]
    repetition, block = divmod(layer, len(blocks))
    experts = list(blocks.values())[block]["ffn"]["experts"]
    assert set(read) == {f"ffn.experts.{name}" for name in experts}
    for name, array in experts.items():
        expected = array[repetition, 5] if array.shape[0] == 2 else array[5]  # of 8 experts
        np.testing.assert_array_equal(read[f"ffn.experts.{name}"], expected)
    assert "ffn.experts.w_in float32[" in capsys.readouterr().out


def test_a_layer(run_dir, tmp_path):
    assert export(run_dir, "--layer", 0, "--output", tmp_path / "l.safetensors") == 0
    read = safetensors.load_file(tmp_path / "l.safetensors")
    first = next(iter(params_of(run_dir)["blocks"].values()))
    assert len(read) == len(jax.tree.leaves(first))
    norm = first["ffn_norm"]["scale"]
    np.testing.assert_array_equal(read["ffn_norm.scale"], norm[0] if norm.ndim == 2 else norm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layer", 4), "--layer = 4: must be between 0 and 3"),
        (("--layer", 1, "--expert", 8), "--expert = 8: must be between 0 and 7"),
        (("--layer", 0, "--expert", 0), "--expert = 0: layer 0 has no experts"),
        (("--expert", 0), "--layer = (nothing): must be given"),
        (("--layer", 1, "--output", ""), "--output = (nothing): must be given"),
        (("--layer", 1, "--output", "/nowhere/at/all"), "--output = /nowhere/at/all: cannot be written: "),
    ],
)
def test_bad_input_writes_nothing(run_dir, tmp_path, options, message, capsys):
    output = () if "--output" in options else ("--output", tmp_path / "x.safetensors")
    assert export(run_dir, *options, *output) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(run_dir, tmp_path, capsys):
    path = tmp_path / "mine.txt"
    path.write_text("mine")
    assert export(run_dir, "--layer", 1, "--output", path) == 2
    assert "must be a new file" in capsys.readouterr().err and path.read_text() == "mine"
