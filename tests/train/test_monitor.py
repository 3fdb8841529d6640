"""What a run reports: exact metrics with each step once, a readable terminal, one run per directory."""

import contextlib
import json
import logging
import math
import os
import pty
import re
import select
import struct
import subprocess
import sys

import numpy as np
import pytest

from train.config import LogConfig
from train.errors import ConfigError
from train.lock import lock_run
from train.metrics import Metrics, read
from train.monitor import Monitor
from train.terminal import LiveTerminal, Pace, PlainTerminal, duration, summary


def make_monitor(run_dir, stream, *, start_step=0, tensorboard=False, total_steps=30):
    config = LogConfig(tensorboard=tensorboard)
    return Monitor(
        run_dir, config, total_steps=total_steps, start_step=start_step, tokens_per_step=64, stream=stream
    )


class Screen:
    """A stream that keeps what was written; not a terminal."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return False


class TestMetrics:
    def test_bits_survive(self, tmp_path):
        values = {"loss": float(np.float32(0.1)), "tiny": 5e-324, "third": 1 / 3, "negative_zero": -0.0}
        strange = {"nan": math.nan, "up": math.inf, "down": -math.inf}
        metrics = Metrics(tmp_path / "m")
        metrics.append({"step": 3, "numpy": np.float32(0.1), "count": np.int64(2**60)} | values | strange)
        metrics.close()
        (line,) = (tmp_path / "m").read_text().splitlines()
        json.loads(line, parse_constant=pytest.fail)  # strict JSON
        (record,) = read(tmp_path / "m")
        assert record["numpy"] == values["loss"] and record["count"] == 2**60
        assert all(
            struct.pack("d", record[name]) == struct.pack("d", value) for name, value in values.items()
        )
        assert math.isnan(record["nan"]) and (record["up"], record["down"]) == (math.inf, -math.inf)

    def test_cut_back(self, tmp_path):
        path = tmp_path / "m"
        kept = b'{"step": 1, "loss": 1.10}\n{"step": 2, "eval/loss": 2}\n'
        path.write_bytes(kept + b'{"step": 3, "loss": 3}\n{"step": 1, "lo')
        metrics = Metrics(path)
        metrics.truncate_after(2)
        assert path.read_bytes() == kept
        metrics.append({"step": 3})
        metrics.close()
        assert path.read_bytes() == kept + b'{"step": 3}\n'
        assert os.listdir(tmp_path) == ["m"]

    def test_damaged_lines_are_cut_out_and_named(self, tmp_path, caplog):
        whole = b'{"step": 1, "loss": 2.0}\n'
        damage = (b"[" * 50_000, b"\0\0", b"[1]", b"{}", b'{"step": "1"}', b'{"step": 1', b"\xff")
        (tmp_path / "metrics.jsonl").write_bytes(whole + b"\n".join(damage) + b"\n" + whole[:9])
        with contextlib.closing(Metrics(tmp_path / "metrics.jsonl")) as metrics:
            metrics.truncate_after(2)
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == len(damage) and told[0].endswith(
            "metrics.jsonl line 2 is not a record of metrics and is left out"
        )

    def test_failed_cut_leaves_the_file(self, tmp_path, monkeypatch):
        metrics = Metrics(tmp_path / "m")
        metrics.append({"step": 1})
        metrics.append({"step": 2})

        def full(descriptor):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError):
            metrics.truncate_after(1)
        assert [record["step"] for record in read(tmp_path / "m")] == [1, 2]


class TestMonitor:
    def test_files(self, tmp_path):
        screen = Screen()
        with make_monitor(tmp_path, screen) as monitor:
            monitor.train(1, {"loss": 2.5, "moe/max_vio": 0.25})
            monitor.evaluation(1, 2.25)
            logging.getLogger("moejax").info("hello")
            logging.getLogger("moejax").warning("careful")
        train, evaluation = read(tmp_path / "metrics.jsonl")
        assert next(iter(train)) == "step" and train["loss"] == 2.5 and train["tokens"] == 64
        assert math.isclose(train["tokens_per_second"] * train["step_seconds"], 64)
        assert evaluation == {"step": 1, "eval/loss": 2.25}
        logged = (tmp_path / "log.txt").read_text()
        assert "INFO hello\n" in logged and "WARNING careful\n" in logged
        assert "hello\nwarning: careful\n" in screen.text
        assert re.search(
            r"^step 1/30  loss 2\.5000  balance 0\.25  tokens/s [\d,]+  ETA -:--$", screen.text, re.M
        )
        assert "\x1b" not in screen.text and "\r" not in screen.text

    def test_resumed_run_has_each_step_once(self, tmp_path):
        with make_monitor(tmp_path, Screen()) as monitor:
            for step in (10, 20, 25):
                monitor.train(step, {"loss": float(step)})
        with make_monitor(tmp_path, Screen(), start_step=20) as monitor:
            monitor.train(25, {"loss": -1.0})
        assert [(r["step"], r["loss"]) for r in read(tmp_path / "metrics.jsonl")] == [
            (10, 10),
            (20, 20),
            (25, -1),
        ]
        with make_monitor(tmp_path, Screen()):
            pass
        assert not list(read(tmp_path / "metrics.jsonl"))

    def test_own_times_win_and_pauses_do_not_count(self, tmp_path, monkeypatch):
        now = [100.0]
        monkeypatch.setattr("train.monitor.clock.now", lambda: now[0])
        with make_monitor(tmp_path, Screen()) as monitor:
            now[0] += 4.0
            with monitor.paused():
                now[0] += 50.0
            monitor.train(2, {})
            monitor.train(3, {"step_seconds": 7.0, "tokens_per_second": 1.0})
        first, second = read(tmp_path / "metrics.jsonl")
        assert (first["step_seconds"], first["tokens_per_second"]) == (2.0, 32.0)
        assert (second["step_seconds"], second["tokens_per_second"]) == (7.0, 1.0)

    def test_nothing_stays_behind(self, tmp_path):
        logger = logging.getLogger("moejax")
        before = (list(logger.handlers), logger.level)
        monitor = make_monitor(tmp_path, Screen())
        monitor.close()
        monitor.close()
        assert (logger.handlers, logger.level) == before

    @pytest.mark.parametrize("tensorboard", [False, True])
    def test_full_disk_fails_the_run_at_once(self, tmp_path, tensorboard):
        (tmp_path / "tensorboard").mkdir()
        script = f"""
import logging, resource, signal
from pathlib import Path
from train.config import LogConfig
from train.errors import TrainingFailed
from train.monitor import Monitor
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
config = LogConfig(tensorboard={tensorboard})
try:
    with Monitor({str(tmp_path)!r}, config, total_steps=9, start_step=0, tokens_per_step=1) as monitor:
        monitor.train(1, {{"loss": 1.0}})
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        for step in range(2, 40):
            logging.getLogger("moejax").info("x" * 100)
            monitor.train(step, {{"loss": 1.0}})
except TrainingFailed as error:
    print(error)
"""
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=30
        )
        assert re.match(r"the metrics of step \d+ could not be written: .*File too large", done.stdout), done
        assert "Traceback" not in done.stderr

    def test_lost_terminal_does_not_stop_training(self, tmp_path):
        class Gone(Screen):
            def write(self, text):
                raise BrokenPipeError

        with make_monitor(tmp_path, Gone()) as monitor:
            monitor.train(1, {"loss": 1.0})
            monitor.evaluation(1, 1.0)
            logging.getLogger("moejax").info("x")
        assert len(list(read(tmp_path / "metrics.jsonl"))) == 2

    def test_tensorboard_events(self, tmp_path):
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        for start_step in (0, 20):  # twice within a second: the files must not have the same name
            with make_monitor(tmp_path, Screen(), start_step=start_step, tensorboard=True) as monitor:
                monitor.train(start_step + 10, {"loss": 0.5})
        files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: int(path.suffix[1:]))
        events = [[Event.FromString(data) for data in tfrecords(path.read_bytes())] for path in files]
        assert len(events) == 2
        for start_step, (version, session, scalars) in zip((0, 20), events, strict=True):
            assert version.file_version == "brain.Event:2"
            assert session.session_log.status == SessionLog.START
            assert session.step == (start_step + 1 if start_step else 0)  # readers purge from here on
            assert scalars.step == start_step + 10
            assert {v.tag: v.simple_value for v in scalars.summary.value}["loss"] == 0.5


def tfrecords(content):
    """Payloads of a TFRecord file: length (8), its checksum (4), payload, checksum (4)."""
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]


class TestTerminal:
    def test_plain_lines_come_every_few_seconds(self):
        now, screen = [0.0], Screen()
        terminal = PlainTerminal(screen, 100, clock=lambda: now[0])
        for step in range(1, 101):
            terminal.train(step, {"loss": 1.0})
            now[0] += 0.5
        shown = [int(re.match(r"step (\d+)/100", line).group(1)) for line in screen.text.splitlines()]
        assert shown == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
        assert "step 51/100  loss 1.0000  ETA 0:24" in screen.text

    def test_plain_lines_tell_how_far_an_evaluation_is(self):
        now, screen = [0.0], Screen()
        terminal = PlainTerminal(screen, 100, clock=lambda: now[0])
        for done in range(16, 97, 16):
            terminal.evaluating(done, 100)
            now[0] += 2.0
        assert screen.text.splitlines() == [f"evaluating  {done}/100 batches" for done in (16, 64)]

    def test_drops_are_shown_with_their_main_cause(self):
        drops = {"moe/dropped_fraction": 0.25, "moe/dropped_by_router": 0.05, "moe/dropped_at_sender": 0.2}
        assert summary(drops) == "dropped 25.0% (sender)"
        assert summary({"moe/dropped_fraction": 0.0}) == ""

    def test_pace_leaves_the_compilation_out(self):
        now = [0.0]
        pace = Pace(30, clock=lambda: now[0])
        now[0] = 60.0
        assert pace.remaining(1) == "-:--"
        now[0] = 70.0
        assert pace.remaining(11) == "0:19"

    def test_duration(self):
        assert [duration(s) for s in (0, 59.6, 754, 3723)] == ["0:00", "1:00", "12:34", "1:02:03"]

    def test_live_view_on_a_real_terminal(self, tmp_path, monkeypatch):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "200")
        controller, user = pty.openpty()
        with os.fdopen(user, "w") as stream:
            with make_monitor(tmp_path, stream) as monitor:
                logging.getLogger("moejax").info("[bold]hello[/bold]")
                monitor.train(10, {"loss": 2.5, "moe/max_vio": 0.25})
                monitor.evaluating(16, 624)
                monitor.evaluation(10, 2.25)
                monitor.train(20, {"loss": 2.0, "moe/max_vio": 0.5})
            shown = ""
            while "\x1b[?25h" not in shown:  # the cursor is given back; a pty hands out what it has so far
                assert select.select([controller], [], [], 10)[0], shown
                shown += os.read(controller, 100_000).decode()
        os.close(controller)
        plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
        assert plain != shown
        assert "[bold]hello[/bold]" in plain
        assert "0/30 compiling" in plain and "evaluating 16/624" in plain
        last = plain.splitlines()[-1]
        for part in ("20/30", "loss 2.0000", "balance 0.50", "eval 2.2500", "tokens/s", "ETA 0:0"):
            assert part in last, (part, last)

    def test_a_finished_run_compiles_nothing(self):
        screen = Screen()
        LiveTerminal(screen, 30, 30).close()
        assert "30/30 finished" in screen.text and "compiling" not in screen.text


class TestLock:
    def test_second_run_is_refused_until_the_first_ends(self, tmp_path):
        script = f"""
from train.lock import lock_run
with lock_run({str(tmp_path)!r}):
    print("held", flush=True)
    input()
"""
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        with subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        ) as process:
            assert process.stdout.readline() == "held\n"
            refusal = rf"workdir = .*in use by process {process.pid} on "
            with pytest.raises(ConfigError, match=refusal), lock_run(tmp_path):
                pass
            process.kill()
        with lock_run(tmp_path), pytest.raises(ConfigError), lock_run(tmp_path):
            pass
