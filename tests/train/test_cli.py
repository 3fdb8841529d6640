import os
import subprocess
import sys
import types

import jax
import pytest

from train.cli import main
from train.commands import COMMANDS
from train.config import TrainConfig
from train.config_io import save_config
from train.errors import ConfigError, Interrupted, SaveStuck, TrainingFailed
from train.fields import leaf_types


@pytest.fixture(autouse=True)
def known_names(monkeypatch):
    routers = {"topk": types.SimpleNamespace(default_top_k=2)}
    monkeypatch.setitem(sys.modules, "moejax.routing", types.SimpleNamespace(ROUTERS=routers))
    monkeypatch.setitem(
        sys.modules, "moejax.levels", types.SimpleNamespace(EXCHANGES=("all_to_all", "all_gather"))
    )


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """What `train` was called with."""
    calls = []
    module = types.SimpleNamespace(train=lambda config, name: calls.append((config, name)))
    monkeypatch.setitem(sys.modules, "train.loop", module)
    return calls


@pytest.fixture
def run_directory(empty_folder):
    (empty_folder / "run").mkdir()
    (empty_folder / "odd" / "config.yaml").mkdir(parents=True)
    save_config(TrainConfig(), empty_folder / "run" / "config.yaml")
    return "run"


def refused(capsys, line, code=2):
    """Run a command line that must be refused; returns its one line of error without `error: `."""
    before = sorted(os.listdir())
    assert main(line) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert sorted(os.listdir()) == before
    return err[len("error: ") : -1]


def test_train_hands_over_config_and_name(trained):
    line = [
        "train",
        "quickstart",
        "--steps",
        "5",
        "--model.moe.top-k=1",
        "--workdir",
        "w",
        "--log.every",
        "2",
    ]
    assert main(line) == 0
    ((config, name),) = trained
    assert name == "quickstart"
    assert (config.steps, config.model.moe.top_k, config.workdir, config.log.every) == (5, 1, "w", 2)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_cpu_devices_stand_anywhere(trained, place):
    line = ["train", "quickstart"]
    line[place:place] = ["--cpu-devices", "8"]
    assert main([*line, "--mesh.expert", "8"]) == 0
    assert trained[0][0].mesh.expert == 8


def test_train_again_from_the_yaml_of_a_run(trained, run_directory):
    assert main(["train", "run/config.yaml", "--steps", "9"]) == 0
    config, name = trained[0]
    assert (config.steps, name) == (9, "run")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "command = (nothing): must be one of train, eval, generate, report, export, launch, doctor"),
        (
            "trian quickstart",
            "command = trian: must be one of train, eval, generate, report, export, launch, doctor; "
            "the nearest is train",
        ),
        ("train", "CONFIG = (nothing): must be given"),
        ("train quickstart more", "argument = more: one argument too many"),
        ("train quickstrat", "CONFIG = quickstrat: no such config file; the nearest is quickstart"),
        ("train quickstart --steps abc", "steps = abc: must be an integer"),
        ("train quickstart --steps", "--steps = (nothing): needs a value"),
        ("train quickstart --steps --seed 3", "--steps = (nothing): needs a value"),
        (
            "train quickstart --model.moe.topk 2",
            "model.moe.topk = 2: no such field; the nearest is model.moe.top_k",
        ),
        ("train quickstart --foo", "foo = (nothing): no such field"),
        (
            "train quickstart -steps 3",
            "argument = -steps: options begin with two dashes; the nearest is steps",
        ),
        ("train quickstart --lr 1", "lr = 1: no such field; the nearest is optimizer.learning_rate"),
        (
            "launch --cpu-devices 2 train quickstart",
            "--cpu-devices = 2: has no meaning for launch; write --devices-per",
        ),
        ("launch --devices_per_process 0 train x", "--devices-per-process = 0: must be between"),
        ("train quickstart --cpu-device 2", "cpu_device = 2: no such field; the nearest is cpu_devices"),
        ("train quickstart --cpu-devices 0", "--cpu-devices = 0: must be between 1 and 4096"),
        ("train quickstart --cpu-devices many", "--cpu-devices = many: must be an integer"),
        ("eval", "RUN = (nothing): must be given"),
        ("eval nowhere", "RUN = nowhere: no such run directory; there are run"),
        ("eval .", "RUN = .: is not a run directory, for it has no config.yaml"),
        ("eval run/config.yaml", "RUN = run/config.yaml: must be the directory of a run, but is none"),
        ("eval odd", "RUN = odd: is not a run directory, for its config.yaml is no file; there are run"),
        ("eval run --steps 3", "steps = 3: no such field"),
        ("generate run", "--prompt = '': must be given and not empty"),
        ("generate run --prompt \udcff", "--prompt = \\udcff: must be valid UTF-8"),
        (
            "generate run --prompt a --temperature -1",
            "--temperature = -1.0: must be a finite number of at least 0",
        ),
        ("generate run --prompt a --top_p 0", "--top-p = 0.0: must be above 0 and at most 1"),
        ("generate run --prompt a --max-tokens 0", "--max-tokens = 0: must be between 1 and 2147483647"),
        (
            "generate run --prompt a --temprature 1",
            "temprature = 1: no such field; the nearest is temperature",
        ),
        ("doctor now", "argument = now: one argument too many"),
    ],
)
def test_bad_lines_are_refused_in_one_line(capsys, run_directory, trained, line, message):
    assert refused(capsys, line.split()).startswith(message)
    assert trained == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("data.path", "x", "two\nlines"), 2),
        (TrainingFailed("loss is nan at step 7"), 3),
        (Interrupted(15, 7), 143),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 3),
        (OSError(), 3),
        (MemoryError(), 3),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"), 3),
    ],
)
def test_errors_of_a_run_become_exit_codes(capsys, monkeypatch, error, code):
    def train(config, name):
        raise error

    monkeypatch.setitem(sys.modules, "train.loop", types.SimpleNamespace(train=train))
    message = refused(capsys, ["train", "quickstart"], code)
    otherwise = {KeyboardInterrupt: "interrupted", OSError: "OSError", MemoryError: "MemoryError"}
    assert message == (" ".join(str(error).split()) or otherwise[type(error)])
    assert main(["train", "quickstart", "--traceback"]) == code
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_process_does_not_wait_for_a_thread_that_is_stuck(capsys, monkeypatch):
    def train(config, name):
        raise SaveStuck(7, 600)

    codes = []
    monkeypatch.setitem(sys.modules, "train.loop", types.SimpleNamespace(train=train))
    monkeypatch.setattr(os, "_exit", codes.append)
    assert refused(capsys, ["train", "quickstart"], 3).startswith(
        "the checkpoint of step 7 could not be written"
    )
    assert codes == [3]


def test_a_bug_shows_its_traceback(monkeypatch):
    monkeypatch.setitem(sys.modules, "train.loop", types.SimpleNamespace(train=lambda config, name: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        main(["train", "quickstart"])


def test_a_warning_that_the_user_makes_an_error_is_one_line(capsys, monkeypatch):
    def train(config, name):
        raise UserWarning("slow\nhere")

    monkeypatch.setitem(sys.modules, "train.loop", types.SimpleNamespace(train=train))
    monkeypatch.setattr(sys, "warnoptions", ["error"])
    message = refused(capsys, ["train", "quickstart"])
    assert message.startswith("PYTHONWARNINGS = error: makes an error of a warning: slow here; unset it")
    monkeypatch.setattr(sys, "warnoptions", [])
    with pytest.raises(UserWarning):
        main(["train", "quickstart"])


def test_eval_prints_the_loss(capsys, monkeypatch, run_directory):
    module = types.SimpleNamespace(evaluate_run=lambda run: {"run": (1.23456, 4321)}[run])
    monkeypatch.setitem(sys.modules, "train.evaluate", module)
    assert main(["eval", "run"]) == 0
    assert capsys.readouterr() == ("eval/loss 1.2346 nats per token over 4,321 tokens\n", "")


def test_generate_writes_the_text_and_nothing_else(capsys, monkeypatch, run_directory):
    def generate_run(run, prompt, **options):
        yield prompt
        yield f"{run} {sorted(options.items())} é"

    monkeypatch.setitem(sys.modules, "train.generate", types.SimpleNamespace(generate_run=generate_run))
    assert main(["generate", "run", "--prompt=--x", "--top-k", "3", "--seed", "1"]) == 0
    options = [("max_tokens", 256), ("seed", 1), ("temperature", 0.8), ("top_k", 3), ("top_p", None)]
    assert capsys.readouterr() == (f"--xrun {options} é", "")


@pytest.mark.parametrize("config", ["", "quickstart"])
def test_help_of_train_lists_every_field_with_type_default_and_meaning(capsys, config):
    assert main(["train", *config.split(), "--help"]) == 0
    out = capsys.readouterr().out
    for name in leaf_types(TrainConfig):
        assert f"--{name} " in out, name
    words = " ".join(out.replace("│", " ").split())
    assert "--data.batch_size INT Sequences per optimizer step over all devices" in words
    assert "--precision {f32,bf16}" in words
    assert f"Optimizer steps. (default: {240 if config else 1000})" in words


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_of_every_command(capsys, command):
    assert main([command, "-h"]) == 0
    assert COMMANDS[command].summary.split(",")[0] in capsys.readouterr().out


def test_process_help_comes_without_jax_and_a_closed_pipe_ends_quietly(run_directory):
    script = """
import contextlib, io, sys, types
from train.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["--help"]) == 0 and main(["train", "--help"]) == 0
assert main(["train", "quickstart", "--stps", "1"]) == 2
assert "jax" not in sys.modules, "slow start"
text = types.SimpleNamespace(generate_run=lambda *a, **k: iter(["x" * 100] * 10_000))
sys.modules["train.generate"] = text
sys.exit(main(["generate", "run", "--prompt", "a"]))
"""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], **pipes, env=environment, text=True) as process:
        assert process.stdout.read(5) == "xxxxx"
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141, errors
    assert errors == "error: stps = 1: no such field; the nearest is steps\n"


def test_python_dash_m_train():
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    line = [sys.executable, "-m", "train", "train", "quickstart", "--seeds", "1"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: seeds = 1: no such field; the nearest is seed\n"
