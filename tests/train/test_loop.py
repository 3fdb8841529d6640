"""Whole runs: what they write, how they resume, and how they end when something goes wrong."""

import datetime
import errno
import re
import shutil
import signal

import jax
import pytest
from jax._src import array

from tests.train import launching, small
from train import cli, loop, reporter
from train.checkpoint import Checkpoints
from train.config_io import load_config
from train.errors import NotFinite
from train.feed import device_batch
from train.reporter import Reporter


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


@pytest.mark.landing
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


@pytest.mark.landing
def test_the_device_has_few_steps_before_it(run, monkeypatch):
    begun, awaited, add, wait = [], [], Reporter.add, jax.block_until_ready

    def spy(self, step, metrics, **options):
        begun.append(metrics)
        add(self, step, metrics, **options)

    def awaiting(value):
        awaited.extend((len(begun), step) for step, metrics in enumerate(begun, 1) if metrics is value)
        return wait(value)

    monkeypatch.setattr(Reporter, "add", spy)
    monkeypatch.setattr(jax, "block_until_ready", awaiting)
    assert run("--log.every", 100, "--checkpoint.every", 0) == 0
    # Step 1 is logged, and fetched, while step 2 runs.
    assert awaited == [(step + reporter.QUEUED, step) for step in range(2, 13 - reporter.QUEUED)]


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


@pytest.mark.landing
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


@pytest.mark.slow
def test_nan_rolls_back_ten_times_at_most(run, capsys, monkeypatch):
    monkeypatch.setattr(loop, "MAX_ROLLBACKS", 1)
    options = ("--optimizer.learning_rate", 1e38, "--optimizer.warmup_steps", 0)
    assert run("--steps", 6, "--checkpoint.on_nan", "rollback", *options) == 3
    assert "back to step 0" in (run.workdir / "log.txt").read_text()


@pytest.mark.landing
def test_the_clock_makes_checkpoints_too(run):
    minutes = 1e-6
    assert (
        run("--steps", 6, "--checkpoint.every", 0, "--log.every", 2, "--checkpoint.every_minutes", minutes)
        == 0
    )
    assert "checkpoint of step 2: written in" in (run.workdir / "log.txt").read_text()
    assert "checkpoint of step 3: written in" not in (run.workdir / "log.txt").read_text()


@pytest.mark.landing
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


@pytest.mark.landing
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


@pytest.mark.landing
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


@pytest.mark.landing
def test_paths_are_found_again_from_another_folder_and_when_all_has_moved(run, capsys, tmp_path, monkeypatch):
    project, run.workdir = tmp_path / "project", tmp_path / "project" / "run"
    (tmp_path / "elsewhere").mkdir()
    project.mkdir()
    run.text.rename(project / "text.txt")
    monkeypatch.chdir(project)
    assert run("--steps", 2, "--data.path", "text.txt") == 0
    assert load_config(run.workdir / "config.yaml").data.path == str(project / "text.txt")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert cli.main(["eval", str(run.workdir)]) == 0
    assert run("--steps", 3, "--data.path", "text.txt") == 0, "the same command is the same run"
    capsys.readouterr()
    assert run("--steps", 4, "--data.path", "ext.txt") == 2
    assert "data.path" in capsys.readouterr().err

    moved = project.rename(tmp_path / "moved")
    run.workdir = moved / "run"
    for command, *words in (
        ("eval",),
        ("report",),
        ("generate", "--prompt", "to be", "--max-tokens", "2"),
        ("export", "--layer", "0", "--output", str(tmp_path / "layer.safetensors")),
    ):
        assert cli.main([command, str(run.workdir), *words]) == 0, command
    report = (run.workdir / "report" / "report.html").read_text()
    assert "Which tokens each expert prefers" in report, "the data was found"
    line = f"data.path: {project}/text.txt is now {moved}/text.txt, with the same content"
    assert f"warning: {line}" in capsys.readouterr().err
    assert run("--steps", 4, "--data.path", "text.txt") == 0
    log = (run.workdir / "log.txt").read_text()
    assert log.count(line) == 1 and "going on after step 3" in log
    assert load_config(run.workdir / "config.yaml").data.path == str(moved / "text.txt")
    (moved / "text.txt").write_text((moved / "text.txt").read_text() + "more")
    capsys.readouterr()
    for words in (
        ["eval", str(run.workdir)],
        ["train", str(run.workdir / "config.yaml"), "--workdir", str(run.workdir)],
    ):
        assert cli.main(words) == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert error.startswith(
            f"error: data.path = {moved}/text.txt: its content has changed since the run began"
        )


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


@pytest.mark.landing
def test_kill_and_sigterm_cost_nothing(run, tmp_path):
    options = ("--cpu-devices", 2, "--steps", 40, "--checkpoint.every", 5)
    launching.run("train", run.config, "--workdir", tmp_path / "whole", *options)

    workdir = tmp_path / "killed"
    disturbed = ("train", launching.paced(run.config), "--workdir", workdir, *options)
    process = launching.start(*disturbed)
    launching.wait_for_step(workdir, 13, process)
    process.kill()
    process.communicate()
    process = launching.start(*disturbed)
    launching.wait_for_step(workdir, 23, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 143, output
    launching.run("train", run.config, "--workdir", workdir, *options)
    assert small.read_metrics(workdir) == small.read_metrics(tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_cuts_an_evaluation_short_and_the_same_command_does_it_whole(run, monkeypatch, capsys):
    taken, signals = [], set()

    def take(batch, mesh):
        taken.append(batch)
        if len(taken) in signals:
            signal.raise_signal(signal.SIGTERM)
        return device_batch(batch, mesh)

    monkeypatch.setattr("train.evaluate.device_batch", take)
    options = ("--eval.every", 6)
    assert run(*options) == 0
    undisturbed, each = small.read_metrics(run.workdir), len(taken) // 2
    taken.clear()
    # In the evaluation after step 6, in the same again, and, when that has been done, in the last one.
    signals |= {2, 4, 4 + each + 2}
    run.workdir = run.workdir.with_name("disturbed")
    written = []
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *args: written.append(args[1]) or save(*args))
    for done, steps in ((2, 6), (4, 6), (4 + each + 2, 12)):
        assert run(*options) == 143 and len(taken) == done, "left after that batch"
        assert f"stopped by signal 15 after step {steps}" in capsys.readouterr().err
        assert (run.workdir / "checkpoints" / str(steps)).is_dir()
        lines = small.read_metrics(run.workdir)
        assert lines == [line for line in undisturbed if line["step"] < steps + ("loss" in line)]
        # As if a run that went on had been killed between the evaluation and its checkpoint.
        with (run.workdir / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {steps}, "eval/loss": 0.0}}\n')
    for _ in range(2):  # the second time nothing is left to do
        assert run(*options) == 0 and len(taken) == 4 + each + 2 + each
        assert small.read_metrics(run.workdir) == undisturbed, "to the last bit"
    assert written == [5, 6, 6, 10, 12, 12], "not once more where nothing has been done"
    assert "already finished" in (run.workdir / "log.txt").read_text()


@pytest.mark.slow
def test_a_run_that_begins_anew_in_a_used_workdir_says_so(run):
    assert run("--steps", 2) == 0
    shutil.move(run.workdir / "checkpoints" / "2", run.workdir / "checkpoints" / ".replaced-2")
    assert run("--steps", 3) == 0, "what a kill left between two renames is put back"
    said = "there is no checkpoint: the run begins anew"
    assert said not in (run.workdir / "log.txt").read_text()
    assert steps_of(small.read_metrics(run.workdir)) == [1, 2, 3]
    shutil.rmtree(run.workdir / "checkpoints")
    assert run("--steps", 1) == 0
    assert said in (run.workdir / "log.txt").read_text()
    assert steps_of(small.read_metrics(run.workdir)) == [1]


@pytest.mark.landing
def test_without_a_period_only_the_last_step_is_kept(run):
    assert run("--steps", 3, "--checkpoint.every", 0) == 0
    assert [path.name for path in (run.workdir / "checkpoints").iterdir()] == ["3"]


@pytest.mark.slow
def test_runs_of_the_same_second_do_not_share_a_directory(run, tmp_path, monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("train.workdir.datetime", Clock)
    monkeypatch.chdir(tmp_path)
    for seed in ("0", "1"):
        assert cli.main(["train", str(run.config), "--steps", "1", "--seed", seed]) == 0
    names = ["small-20260102-030405", "small-20260102-030405-2"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names
    for seed, name in enumerate(names):
        assert load_config(tmp_path / "runs" / name / "config.yaml").seed == seed
        assert [line["step"] for line in small.read_metrics(tmp_path / "runs" / name) if "loss" in line] == [
            1
        ]
