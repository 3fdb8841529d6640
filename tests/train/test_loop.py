"""Whole runs: what they write, how they resume, and how they end when something goes wrong."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax._src import array

import moejax
from tests import tolerance
from tests.train import small
from train import cli, loop, reporter
from train.config_io import find_config, load_config, save_config
from train.data import load_corpus, load_tokenizer
from train.errors import NotFinite
from train.evaluate import IN_FLIGHT, Evaluation, evaluate, evaluate_run, restore_params
from train.feed import device_batch
from train.generate import generate_run, sample
from train.model import ModelSpec
from train.reporter import Reporter


@pytest.fixture
def run(tmp_path):
    """`run(*options) -> exit code` of the small run on eight devices; its directory is `run.workdir`."""
    text = small.write_text(tmp_path / "text.txt")
    base = small.config()
    base = dataclasses.replace(base, data=dataclasses.replace(base.data, path=str(text)))
    path = small.write_config(tmp_path / "small.py", base)

    def start(*options):
        return cli.main(["train", str(path), "--workdir", str(start.workdir), *map(str, options)])

    start.workdir, start.config, start.text = tmp_path / "run", path, text
    return start


def steps_of(lines, field="loss"):
    return [line["step"] for line in lines if field in line]


def test_a_run_writes_what_it_promises(run, capsys):
    assert run("--log.tensorboard", True, "--eval.every", 6) == 0
    lines = small.read_metrics(run.workdir)
    assert steps_of(lines) == list(range(1, 13)) and steps_of(lines, "eval/loss") == [6, 12]
    names = "loss aux_loss grad_norm learning_rate tokens moe/max_vio moe/dropped_fraction moe/rounds moe/dead_experts"
    assert set(names.split()) <= set(lines[0])
    assert lines[0]["tokens"] == 8 * 16 and all(line["moe/rounds"] == 1 for line in lines if "loss" in line)
    assert load_config(run.workdir / "config.yaml").steps == 12
    log = (run.workdir / "log.txt").read_text()
    assert re.search(r"parameters: [\d,]+ in all, [\d,]+ active", log) and "sha256" in log
    assert {path.name for path in (run.workdir / "checkpoints").iterdir()} >= {"10", "12"}
    assert any((run.workdir / "tensorboard").iterdir())
    assert "\x1b" not in capsys.readouterr().err, "no colours or cursor moves outside of a terminal"

    assert cli.main(["eval", str(run.workdir)]) == 0
    evaluated = float(re.search(r"eval/loss (\d+\.\d+)", capsys.readouterr().out)[1])
    assert evaluated == pytest.approx(lines[-1]["eval/loss"], abs=1e-4)

    arguments = ["generate", str(run.workdir), "--prompt", "to be", "--max-tokens", "30"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr()
    assert first.out.startswith("to be") and len(first.out) > 20 and first.err == ""
    assert cli.main(arguments) == 0 and capsys.readouterr().out == first.out, "the same seed, the same text"
    assert cli.main([*arguments, "--seed", "1"]) == 0 and capsys.readouterr().out != first.out


def test_a_finished_run_is_left_alone_and_more_steps_extend_it(run):
    assert run("--steps", 4) == 0
    before = small.read_metrics(run.workdir)
    assert run("--steps", 4) == 0 and small.read_metrics(run.workdir) == before
    assert run("--steps", 6) == 0
    assert steps_of(small.read_metrics(run.workdir)) == [1, 2, 3, 4, 5, 6]


def test_nothing_is_compiled_after_the_first_step_and_nothing_fetched_between_logs(run, monkeypatch):
    compiled, fetched, marks = [], [], []
    value, add = array.ArrayImpl._value.fget, Reporter.add

    def count_compilation(name, _, **__):
        compiled.extend([name] if name.endswith("backend_compile_duration") else [])

    def count_fetch(self):
        fetched.append(self.shape)
        return value(self)

    def mark_step(self, *arguments, **options):
        add(self, *arguments, **options)
        marks.append((len(compiled), len(fetched)))

    monkeypatch.setattr(array.ArrayImpl, "_value", property(count_fetch))
    monkeypatch.setattr(Reporter, "add", mark_step)
    jax.monitoring.register_event_duration_secs_listener(count_compilation)
    try:
        assert run("--log.every", 100, "--checkpoint.every", 0) == 0
    finally:
        jax.monitoring.clear_event_listeners()
    assert len(marks) == 12
    # Step 1 is logged while step 2 runs; then there is nothing to report before step 12.
    assert marks[0][0] > 0 and marks[0][0] == marks[10][0], "no compilation after the first step"
    assert marks[2][1] == marks[10][1], "no array is read between two logged steps"
    assert len(fetched) > marks[10][1] > 0, "the spy does see the reports"


def test_nan_ends_the_run_and_names_step_and_layer(run, capsys):
    assert run("--steps", 6, "--checkpoint.every", 2) == 0
    good = sorted(path.name for path in (run.workdir / "checkpoints").iterdir())
    options = ("--optimizer.learning_rate", 1e38, "--optimizer.warmup_steps", 0, "--checkpoint.every", 2)
    other = run.workdir.with_name("other")
    assert cli.main(["train", str(run.config), "--workdir", str(other), *map(str, options)]) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: step \d+: .*layer \d+", error), error
    left = other / "checkpoints"
    assert not left.exists() or not [path for path in left.iterdir() if path.name.isdecimal()]
    assert sorted(path.name for path in (run.workdir / "checkpoints").iterdir()) == good


def test_nan_rolls_back_to_the_checkpoint_and_leaves_bad_batches_out(run, monkeypatch):
    taken, raised, refuse = [], [], Reporter._refuse_nan

    def take(batch, mesh):
        taken.append(batch["index"].tolist())
        return device_batch(batch, mesh)

    def nan_of_two_batches(self, step, metrics):
        # The eighth batch; then, when step 6 is that of the ninth, the tenth.
        if step == [8, 7, None][len(raised)]:
            raised.append(step)
            raise NotFinite(step, f"step {step}: loss nan")
        refuse(self, step, metrics)

    monkeypatch.setattr("train.loop.device_batch", take)
    undisturbed = ("--steps", 18, "--checkpoint.every", 5)
    assert run(*undisturbed) == 0
    batches = taken[:]
    taken.clear()
    monkeypatch.setattr(Reporter, "_refuse_nan", nan_of_two_batches)
    monkeypatch.setattr(reporter, "MAX_AHEAD", 1)
    run.workdir = run.workdir.with_name("rolled-back")
    assert run("--steps", 12, "--checkpoint.every", 5, "--checkpoint.on_nan", "rollback") == 0
    again = taken.index(batches[8], 8)  # the host was a step ahead of the report
    assert taken[:again][:8] == batches[:8] and taken[-7:] == batches[10:17], "on with the eleventh batch"
    assert raised == [8, 7]
    assert steps_of(small.read_metrics(run.workdir)) == list(range(1, 13))
    log = (run.workdir / "log.txt").read_text()
    assert "step 8 gave NaN: back to step 5, and on with the batch after the bad one" in log


def test_nan_rolls_back_ten_times_at_most(run, capsys, monkeypatch):
    monkeypatch.setattr(loop, "MAX_ROLLBACKS", 1)
    options = ("--optimizer.learning_rate", 1e38, "--optimizer.warmup_steps", 0)
    assert run("--steps", 6, "--checkpoint.on_nan", "rollback", *options) == 3
    assert "back to step 0" in (run.workdir / "log.txt").read_text()


def test_the_clock_makes_checkpoints_too(run):
    minutes = 1e-6
    assert (
        run("--steps", 6, "--checkpoint.every", 0, "--log.every", 2, "--checkpoint.every_minutes", minutes)
        == 0
    )
    assert "checkpoint of step 2: written in" in (run.workdir / "log.txt").read_text()
    assert "checkpoint of step 3: written in" not in (run.workdir / "log.txt").read_text()


def test_nan_ends_a_run_that_logs_rarely_within_few_steps(run, capsys, monkeypatch):
    monkeypatch.setattr(reporter, "MAX_AHEAD", 3)
    taken, add = [], Reporter.add

    def count(self, step, *arguments, **options):
        taken.append(step)
        add(self, step, *arguments, **options)

    monkeypatch.setattr(Reporter, "add", count)
    options = ("--optimizer.learning_rate", 1e38, "--optimizer.warmup_steps", 0, "--log.every", 1000)
    assert run("--steps", 100, "--checkpoint.every", 0, *options) == 3
    named = int(re.search(r"error: step (\d+):", capsys.readouterr().err)[1])
    assert named <= taken[-1] <= named + 3


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_intact(run, capsys, monkeypatch):
    assert run("--steps", 5) == 0

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train.checkpoint.write_manifest", full)
    assert run("--steps", 12) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(r"error: the checkpoint of step 10 .* No space left .* step 5", error), error
    monkeypatch.undo()
    assert run("--steps", 12) == 0
    assert steps_of(small.read_metrics(run.workdir)) == list(range(1, 13))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory\nat x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failing_machine_ends_the_run_with_3_and_a_line_in_the_log(run, capsys, monkeypatch, error):
    placed = []

    def fail_late(batch, mesh):
        placed.append(batch)
        if len(placed) == 8:
            raise error
        return device_batch(batch, mesh)

    monkeypatch.setattr("train.loop.device_batch", fail_late)
    assert run() == 3
    reason = str(error).splitlines()[0]
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"error: {reason}"
    assert f"ERROR ended by {type(error).__name__}: {reason}" in (run.workdir / "log.txt").read_text()
    assert [path.name for path in (run.workdir / "checkpoints").iterdir()] == ["5"]


def test_another_tokenizer_under_the_same_name_is_refused(run, capsys, tmp_path):
    path = tmp_path / "mine.json"
    characters = sorted(set(run.text.read_text()))
    path.write_text(json.dumps({"moejax_tokenizer": "char", "characters": "".join(characters)}))
    assert run("--steps", 2, "--data.tokenizer", path) == 0
    path.write_text(json.dumps({"moejax_tokenizer": "char", "characters": "".join([*characters, "%"])}))
    assert run("--steps", 4, "--data.tokenizer", path) == 2
    assert "error: data.tokenizer = " in capsys.readouterr().err


def test_relative_paths_are_found_again_from_another_folder(run, capsys, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run("--steps", 2, "--data.path", "text.txt") == 0
    assert load_config(run.workdir / "config.yaml").data.path == str(tmp_path / "text.txt")
    monkeypatch.chdir("elsewhere")
    assert cli.main(["eval", str(run.workdir)]) == 0
    assert run("--steps", 3, "--data.path", "text.txt") == 0, "the same command is the same run"
    capsys.readouterr()
    assert run("--steps", 4, "--data.path", "ext.txt") == 2
    assert "data.path" in capsys.readouterr().err


def test_the_best_evaluation_makes_a_checkpoint_of_its_own(run, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 1.0])

    # The last evaluation is over the whole split and has the lowest loss there, but not over the first batch.
    def whole_is_lower(eval_step, params, batches, mesh, **rest):
        found, batches = next(losses), list(batches)
        if len(batches) > 1:
            return Evaluation(np.asarray([27.0, 0.0]), np.asarray([10, 90]))
        return Evaluation(np.asarray([10 * found]), np.asarray([10]))

    monkeypatch.setattr("train.loop.evaluate", whole_is_lower)
    options = (
        "--eval.every",
        2,
        "--eval.max_batches",
        1,
        "--checkpoint.every",
        5,
        "--checkpoint.keep_last",
        1,
    )
    assert run(*options) == 0
    assert sorted(int(path.name) for path in (run.workdir / "checkpoints").iterdir()) == [4, 12]
    assert small.read_metrics(run.workdir)[-1]["eval/loss"] == pytest.approx(0.27)


def test_a_damaged_newest_checkpoint_is_skipped(run, capsys):
    assert run() == 0
    whole = small.read_metrics(run.workdir)
    data = max(
        (run.workdir / "checkpoints" / "12").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size
    )
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    data.write_bytes(flipped)
    assert run() == 0
    assert "step 12 is damaged" in capsys.readouterr().err
    assert small.read_metrics(run.workdir) == whole, "steps 11 and 12 done again, to the same bits"


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--seed", 1, "seed"),
        ("--model.d_model", 32, "model.d_model"),
        ("--data.batch_size", 16, "data.batch_size"),
    ],
)
def test_another_run_in_the_same_workdir_is_refused(run, capsys, option, value, named):
    (run.workdir).mkdir()

    config = dataclasses.replace(find_config(str(run.config))[0], workdir=str(run.workdir))
    save_config(config, run.workdir / "config.yaml")
    assert run(option, value) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: workdir = ") and named in lines[0]
    assert not (run.workdir / "metrics.jsonl").exists()


def test_a_refused_resume_leaves_the_run_as_it_was(run, capsys):
    assert run("--steps", 6) == 0
    files = {
        path: path.read_bytes() for path in run.workdir.rglob("*") if path.is_file() and path.name != ".lock"
    }
    assert run("--steps", 4) == 2
    assert "error: steps = 4: must be at least 6" in capsys.readouterr().err
    run.text.write_text(run.text.read_text().replace("quick", "qu1ck"))
    assert run("--steps", 8) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: data.path = "), lines
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_workdir_that_cannot_be_made_is_bad_input(run, capsys):
    run.workdir = run.workdir.with_name("file") / "below"
    run.workdir.parent.write_text("in the way")
    assert run() == 2
    assert capsys.readouterr().err.startswith("error: workdir = ")


def test_a_workdir_that_cannot_be_locked_is_bad_input(run, capsys):
    (run.workdir / ".lock").mkdir(parents=True)
    assert run() == 2
    assert re.search(r"^error: workdir = .*: cannot be written to: Is a directory$", capsys.readouterr().err)
    assert [path.name for path in run.workdir.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--data.path", "missing.txt"),
        ("--data.sequence_length", 100000),
        ("--data.batch_size", 12),
        ("--mesh.expert", 3),
        ("--model.moe.top_k", 999),
        ("--model.vocab_size", 5),
    ],
)
def test_bad_input_writes_nothing(run, capsys, option, value):
    assert run(option, value) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {option[2:]} = {value}: "), lines
    assert not run.workdir.exists()


def spawn(run, workdir, *options):
    command = [
        sys.executable,
        "-m",
        "train",
        "train",
        str(run.config),
        "--workdir",
        str(workdir),
        *map(str, options),
    ]
    return subprocess.Popen(
        [*command, "--cpu-devices", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ,
    )


def wait_for_step(workdir, step, process):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was never reached: {process.communicate()[0]}")


def test_kill_and_sigterm_cost_nothing(run, tmp_path):
    options = ("--steps", 60, "--checkpoint.every", 5)
    whole = spawn(run, tmp_path / "whole", *options)
    output = whole.communicate()[0]
    assert whole.returncode == 0, output

    workdir = tmp_path / "killed"
    process = spawn(run, workdir, *options)
    wait_for_step(workdir, 13, process)
    process.kill()
    process.communicate()
    process = spawn(run, workdir, *options)
    wait_for_step(workdir, 33, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode == 143, output
    process = spawn(run, workdir, *options)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert small.read_metrics(workdir) == small.read_metrics(tmp_path / "whole")


def test_evaluation_counts_every_token_of_the_split_once(run, capsys):
    assert run("--steps", 2) == 0
    loss, tokens = evaluate_run(str(run.workdir))
    config, tokenizer = load_config(run.workdir / "config.yaml"), load_tokenizer(run.workdir)
    assert tokens == load_corpus(config.data, tokenizer).validation.num_predictions
    assert loss == pytest.approx(small.read_metrics(run.workdir)[-1]["eval/loss"], rel=tolerance.F32)
    run.text.write_text(run.text.read_text().replace("quick", "brisk"))
    assert cli.main(["eval", str(run.workdir)]) == 2
    assert "error: data.path" in capsys.readouterr().err


def test_evaluation_holds_few_batches_at_once(monkeypatch):
    dispatched, fetched, most = [], [], []
    monkeypatch.setattr("train.evaluate.device_batch", lambda batch, mesh: batch)
    monkeypatch.setattr(jax, "device_get", lambda sums: fetched.extend(sums) or sums)

    def eval_step(params, batch):
        dispatched.append(batch)
        most.append(len(dispatched) - len(fetched))
        return {"loss": float(batch), "tokens": 2}

    found = evaluate(eval_step, None, iter(range(2 * IN_FLIGHT + 3)), None, experts_of_layers=())
    assert max(most) == IN_FLIGHT
    assert found.tokens() == 70 and found.loss() == sum(range(35)) / 70
    assert found.tokens(2) == 4 and found.loss(2) == 1 / 4


def test_generation_is_greedy_at_temperature_0_and_equals_the_whole_forward(run, monkeypatch):
    assert run("--steps", 12, "--optimizer.warmup_steps", 1, "--optimizer.learning_rate", 0.01) == 0
    config, tokenizer = load_config(run.workdir / "config.yaml"), load_tokenizer(run.workdir)
    text = "".join(generate_run(str(run.workdir), "the", max_tokens=8, temperature=0))
    spec = ModelSpec.from_config(config, tokenizer.vocab_size)
    model = spec.merge(restore_params(run.workdir, config, spec.abstract_params(None))[1])
    ids = [*tokenizer.encode("the")]
    with jax.set_mesh(jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("one",))):
        for _ in range(8):
            hidden, *_ = model(np.asarray([ids], np.int32))
            ids.append(int(model.logits(hidden)[0, -1].argmax()))
    assert text == "the" + tokenizer.decode(ids[3:])

    shapes = []
    call = moejax.Transformer.__call__

    def spy(self, tokens_BS, **options):
        shapes.append(tokens_BS.shape[1])
        return call(self, tokens_BS, **options)

    monkeypatch.setattr(moejax.Transformer, "__call__", spy)
    for prompt in ("t", "to be or no"):
        list(generate_run(str(run.workdir), prompt, max_tokens=1, temperature=0))
    assert shapes == [16, 16], "one length for short prompts, and nothing is computed after the last token"


def test_sampling_keeps_to_top_k_and_top_p():

    logits = jax.numpy.log(jax.numpy.asarray([0.05, 0.5, 0.3, 0.15]))
    draw = jax.jit(sample, static_argnames=("temperature", "top_k", "top_p"))

    def drawn(**options):
        options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
        return {int(draw(logits, jax.random.key(seed), **options)) for seed in range(60)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_p=0.7) == {1, 2} and drawn(top_p=0.01) == {1}
    assert drawn(temperature=0) == {1}


def test_without_a_period_only_the_last_step_is_kept(run):
    assert run("--steps", 3, "--checkpoint.every", 0) == 0
    assert [path.name for path in (run.workdir / "checkpoints").iterdir()] == ["3"]
