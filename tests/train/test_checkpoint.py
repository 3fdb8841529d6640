"""Checkpoints: bitwise on every layout, and every kind of damage met for real."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from train import checkpoint, processes
from train.checkpoint import Checkpoints
from train.config import CheckpointConfig
from train.errors import ConfigError, TrainingFailed
from train.integrity import MANIFEST, find_fault, find_strays, hash_lines, write_manifest


class State(NamedTuple):
    params: dict
    moments: tuple
    key: jax.Array
    step: jax.Array


def small_state(step: int) -> State:
    return State({"w": jnp.full((4, 3), float(step))}, (), jax.random.key(step), jnp.int32(step))


def awkward_state(sharding_of) -> State:
    """Values and dtypes that a careless writer changes: -0, NaN, bf16, no elements, typed keys."""
    params = {
        "experts": jax.random.normal(jax.random.key(0), (8, 16, 24)),
        "negative_zero": jnp.full((4, 3), -0.0),
        "odd": jnp.array([jnp.nan, -jnp.inf, 1e-40], jnp.bfloat16),
        "none": jnp.zeros((0, 3)),
        "deep": [{"a": jnp.arange(8, dtype=jnp.uint8)}],
    }
    moments = (jax.tree.map(lambda x: x + 1, params), jnp.float32(0.1))
    state = State(params, moments, jax.random.key(7), jnp.int32(2**31 - 1))
    return jax.tree.map(lambda x: jax.device_put(x, sharding_of(x)), state)


def abstract(tree, sharding_of=lambda x: x.sharding):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(x)), tree)


def bits(leaf) -> bytes:
    plain = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
    return np.asarray(plain).tobytes()


def assert_bitwise(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape, bits(a)) == (b.dtype, b.shape, bits(b))


def layout(*axes):
    """A function from a leaf to its sharding; expert matrices are split over `expert`."""
    mesh = Mesh(
        np.array(jax.devices()[: int(np.prod([n for _, n in axes]))]).reshape([n for _, n in axes]),
        [name for name, _ in axes],
    )
    return lambda x: NamedSharding(mesh, P("expert") if x.ndim == 3 else P())


LAYOUTS = {
    "expert4": layout(("expert", 4)),
    "data4_expert2": layout(("data", 4), ("expert", 2)),
    "one_device": lambda x: SingleDeviceSharding(jax.devices()[3]),
}


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "run" / "checkpoints", CheckpointConfig(keep_last=3, keep_best=0)) as made:
        yield made


def save_all(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, small_state(step), {"position": step}, {})
    checkpoints.wait()


def restored_step(checkpoints) -> int:
    """Step of a restore whose every part must belong to that step."""
    step, state, data_state, _ = checkpoints.restore(abstract(small_state(0)))
    assert_bitwise(state, small_state(step))
    assert data_state == {"position": step}
    return step


def largest_data_file(checkpoints, step):
    files = [path for path in (checkpoints.directory / str(step) / "state").rglob("d/*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


class TestRoundTrip:
    @pytest.mark.parametrize("target", LAYOUTS)
    def test_bitwise_on_another_layout(self, checkpoints, target):
        state = awkward_state(LAYOUTS["expert4"])
        data_state = {"random": 2**127 + 1, "files": ["a", "b"]}
        checkpoints.save(5, state, data_state, {"eval/loss": 0.1})
        step, restored, data, extra = checkpoints.restore(abstract(state, LAYOUTS[target]))
        assert (step, data, extra) == (5, data_state, {"eval/loss": 0.1})
        assert_bitwise(restored, state)
        for leaf in jax.tree.leaves(restored):
            assert leaf.sharding == LAYOUTS[target](leaf)

    def test_params_alone(self, checkpoints):
        state = awkward_state(LAYOUTS["expert4"])
        checkpoints.save(5, state, {}, {"best": 2.0})
        step, params, extra = checkpoints.restore_params(abstract(state.params, LAYOUTS["one_device"]))
        assert (step, extra) == (5, {"best": 2.0})
        assert_bitwise(params, state.params)

    def test_donated_buffers_do_not_reach_the_file(self, checkpoints):
        overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
        state = {"w": [jnp.arange(1_000_000.0) + i for i in range(5)]}
        expected = jax.tree.map(np.array, state)
        asked = abstract(state)
        started = time.perf_counter()
        checkpoints.save(1, state, {}, {})
        blocked = time.perf_counter() - started
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        assert blocked < 1.0  # 20 MB; about 10 ms on a quiet machine
        _, restored, _, _ = checkpoints.restore(asked)
        assert_bitwise(jax.tree.map(np.asarray, restored), expected)

    def test_a_save_waits_until_it_is_complete_where_it_is_asked_to(self, tmp_path, monkeypatch):
        released = threading.Event()

        def late(*arguments):
            assert released.wait(timeout=60)
            write_manifest(*arguments)

        monkeypatch.setattr("train.checkpoint.write_manifest", late)
        with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            checkpoints.save(1, small_state(1), {}, {})
            assert checkpoints.steps() == []
            released.set()
        released.clear()
        with Checkpoints(tmp_path, CheckpointConfig(wait=True)) as checkpoints:
            threading.Timer(0.3, released.set).start()
            checkpoints.save(2, small_state(2), {}, {})
            assert checkpoints.steps() == [1, 2]

    def test_nothing_there(self, checkpoints):
        assert checkpoints.restore(abstract(small_state(0))) is None
        assert checkpoints.latest_step() is None
        assert not checkpoints.directory.parent.exists()

    def test_another_model_is_named(self, checkpoints):
        save_all(checkpoints, 1)
        other = small_state(0)._replace(params={"w": jnp.zeros((4, 5)), "b": jnp.zeros(3)})
        named = r"params\.b is only here; params\.w is float32\[4,3\] there, float32\[4,5\] here"
        with pytest.raises(ConfigError, match=named) as error:
            checkpoints.restore(abstract(other))
        assert "\n" not in str(error.value)
        with pytest.raises(ConfigError, match="bfloat16"):
            checkpoints.restore_params({"w": jax.ShapeDtypeStruct((4, 3), jnp.bfloat16)})

    def test_chosen_step(self, checkpoints):
        save_all(checkpoints, 1, 2)
        assert checkpoints.restore(abstract(small_state(0)), step=1)[0] == 1
        with pytest.raises(ConfigError, match=r"there are \[1, 2\]"):
            checkpoints.restore(abstract(small_state(0)), step=3)


class TestRetention:
    def test_newest_and_best(self, tmp_path):
        with Checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_best=1)) as checkpoints:
            for step, loss in enumerate([3.0, 1.0, float("nan"), 2.0, None, 2.5]):
                checkpoints.save(step, small_state(step), {}, {} if loss is None else {"eval/loss": loss})
            checkpoints.wait()
            assert checkpoints.steps() == [1, 4, 5]

    def test_going_on_from_an_older_one_leaves_the_later_ones(self, checkpoints):
        save_all(checkpoints, 10, 20, 30)
        assert checkpoints.restore(abstract(small_state(0)), step=10)[0] == 10
        save_all(checkpoints, 15)
        assert checkpoints.steps() == [10, 15]

    def test_saving_a_step_again_replaces_it(self, checkpoints):
        save_all(checkpoints, 1)
        checkpoints.save(1, small_state(1), {"position": 1}, {"eval/loss": 2.0})
        assert checkpoints.wait() is None
        assert checkpoints.restore(abstract(small_state(0)))[3] == {"eval/loss": 2.0}


def flip_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def remove(path):
    path.unlink()


class TestDamage:
    @pytest.mark.parametrize("harm", [flip_bit, truncate, remove])
    @pytest.mark.parametrize("which", ["data", "record.json", MANIFEST])
    def test_newest_is_skipped_and_replaced(self, checkpoints, caplog, harm, which):
        save_all(checkpoints, 10, 20)
        path = largest_data_file(checkpoints, 20) if which == "data" else checkpoints.directory / "20" / which
        harm(path)
        with caplog.at_level(logging.WARNING, "moejax"):
            assert restored_step(checkpoints) == 10
        (warning,) = caplog.messages
        assert "step 20" in warning
        if which != MANIFEST:
            assert path.relative_to(checkpoints.directory / "20").as_posix() in warning
        assert checkpoints.latest_step() == 10
        caplog.clear()
        save_all(checkpoints, 20)
        assert restored_step(checkpoints) == 20
        assert not caplog.messages

    def test_every_byte_of_a_checkpoint_is_guarded(self, checkpoints):
        save_all(checkpoints, 10)
        directory = checkpoints.directory / "10"
        assert find_fault(directory) is None
        draw = random.Random(0)
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            content = path.read_bytes()
            for _ in range(3):
                changed = bytearray(content)
                changed[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
                path.write_bytes(changed)
                assert find_fault(directory), path
            path.write_bytes(content)
        (directory / "state" / "other").touch()
        assert find_fault(directory) is None and find_strays(directory) == ["state/other"]

    def test_manifests_that_are_cut_off_or_of_an_older_version(self, tmp_path):
        for name in ("a", "b", "c"):
            (tmp_path / name).write_text(name)
        write_manifest(tmp_path, hash_lines(tmp_path))
        *lines, end = (tmp_path / MANIFEST).read_text().splitlines(keepends=True)
        assert end == "# 3 files\n"
        for kept in (lines[:2], [*lines[:2], end], [], [*lines, end[:-1]], [*lines, "# 4 files\n"]):
            (tmp_path / MANIFEST).write_text("".join(kept))
            assert find_fault(tmp_path) in (f"c is not in {MANIFEST}", f"{MANIFEST} is cut off"), kept
        (tmp_path / MANIFEST).write_text("".join(lines))
        (tmp_path / ".DS_Store").touch()
        assert find_fault(tmp_path) is None, "older versions wrote no last line"

    def test_files_of_other_programs_do_no_harm(self, checkpoints, caplog):
        """Among the checkpoints and in each folder of one; those of before a save are not in its manifest."""
        strays = (".DS_Store", ".nfs0000001", "._x", "Thumbs.db", "lost+found/x")

        def leave_in(folder):
            for name in strays:
                (folder / name).parent.mkdir(exist_ok=True, parents=True)
                (folder / name).write_text("left")

        checkpoints.directory.mkdir(parents=True)
        leave_in(checkpoints.directory)
        (checkpoints.directory / "30").touch()
        save_all(checkpoints, 10, 20)
        for folder in [p for p in checkpoints.directory.rglob("*") if p.is_dir()]:
            leave_in(folder)
        with caplog.at_level(logging.WARNING, "moejax"):
            assert restored_step(checkpoints) == 20 and restored_step(checkpoints) == 20
        (line,) = caplog.messages
        assert "checkpoint of step 20 has files of other programs: .DS_Store" in line
        hidden = checkpoints.directory / ".pending-20" / "state"
        hidden.mkdir(parents=True)
        leave_in(hidden)
        assert hash_lines(hidden.parent) == "", "what goes again must not be missed"
        save_all(checkpoints, 40)
        assert restored_step(checkpoints) == 40

    def test_damaged_ones_do_not_count_as_kept(self, tmp_path):
        with Checkpoints(tmp_path, CheckpointConfig(keep_last=2, keep_best=0)) as checkpoints:
            save_all(checkpoints, 10, 20)
            flip_bit(largest_data_file(checkpoints, 20))
            assert restored_step(checkpoints) == 10
            save_all(checkpoints, 30)
            assert checkpoints.steps() == [10, 30]

    def test_none_sound(self, checkpoints):
        save_all(checkpoints, 10, 20)
        remove(largest_data_file(checkpoints, 10))
        shutil.rmtree(checkpoints.directory / "20" / "state")
        with pytest.raises(ConfigError, match=r"none of its checkpoints is sound \(step 20: .*; step 10: "):
            checkpoints.restore(abstract(small_state(0)))

    def test_removed_while_a_reader_looks(self, checkpoints, caplog, monkeypatch):
        save_all(checkpoints, 10, 20)

        def remove_first(directory, share):
            if directory.name == "20":
                shutil.rmtree(directory)
            return find_fault(directory, share)

        monkeypatch.setattr("train.checkpoint.find_fault", remove_first)
        assert restored_step(checkpoints) == 10
        assert not caplog.messages

    def test_removed_or_replaced_while_a_reader_reads(self, checkpoints, caplog, monkeypatch):
        """After the hashes were found right: the next newest is read, or what has taken its place."""
        save_all(checkpoints, 10, 20)
        read, others = Checkpoints._read, [checkpoints.directory / "20"]

        def disturbed(self, step, *arguments, **options):
            if step == 20 and others:
                others.pop().rename(checkpoints.directory / ".discarded-20")
            return read(self, step, *arguments, **options)

        monkeypatch.setattr(Checkpoints, "_read", disturbed)
        assert restored_step(checkpoints) == 10 and not caplog.messages
        shutil.rmtree(checkpoints.directory / ".discarded-20")
        save_all(checkpoints, 20)

        def replaced(self, step, *arguments, **options):
            result = read(self, step, *arguments, **options)
            if not others:
                others.append(step)
                folder = checkpoints.directory / "20"
                shutil.copytree(folder, folder.with_name(".replaced-20"))
                folder.rename(folder.with_name(".discarded-20"))
                folder.with_name(".replaced-20").rename(folder)
            return result

        reads = []
        monkeypatch.setattr(Checkpoints, "_read", lambda *a, **o: reads.append(a) or replaced(*a, **o))
        assert restored_step(checkpoints) == 20 and len(reads) == 2, "read once more, all from one folder"

    def test_all_removed_while_a_reader_looks(self, checkpoints, monkeypatch):
        save_all(checkpoints, 10)
        monkeypatch.setattr("train.checkpoint.find_fault", lambda path, _: shutil.rmtree(path) or "gone")
        assert checkpoints.restore(abstract(small_state(0))) is None

    def test_leftovers_are_ignored_and_swept(self, checkpoints):
        save_all(checkpoints, 10)
        (checkpoints.directory / ".pending-20" / "state").mkdir(parents=True)
        (checkpoints.directory / ".discarded-5").mkdir()
        with Checkpoints(checkpoints.directory, CheckpointConfig()) as fresh:
            assert restored_step(fresh) == 10
            assert (checkpoints.directory / ".pending-20").exists()  # a reader does not touch what is written
            save_all(fresh, 20)
        assert sorted(os.listdir(checkpoints.directory)) == ["10", "20"]

    def test_a_kill_while_one_is_replaced_loses_neither(self, checkpoints, monkeypatch):
        class Killed(BaseException):
            pass

        def killed(*_):
            raise Killed

        save_all(checkpoints, 10)
        (checkpoints.directory / ".discarded-20").mkdir()
        with monkeypatch.context() as patch:
            # `finally` and `except` say nothing of a kill: the sweep that follows an error does not happen either.
            patch.setattr(checkpoints, "_failure", killed)
            rename = type(checkpoints.directory).rename
            patch.setattr(
                type(checkpoints.directory),
                "rename",
                lambda path, to: killed() if path.name.startswith(".pending") else rename(path, to),
            )
            checkpoints.save(10, small_state(10), {"position": 10}, {"eval/loss": 2.0})
            with pytest.raises(Killed):
                checkpoints.wait()
        assert sorted(os.listdir(checkpoints.directory)) == [".discarded-20", ".pending-10", ".replaced-10"]
        with Checkpoints(checkpoints.directory, CheckpointConfig()) as fresh:
            assert fresh.restore(abstract(small_state(0))) is None, "a reader renames nothing"
            fresh.recover()
            assert restored_step(fresh) == 10
            save_all(fresh, 20)
        assert sorted(os.listdir(checkpoints.directory)) == ["10", "20"]

    def test_a_replacement_that_fails_leaves_the_one_there_was(self, checkpoints, monkeypatch):
        save_all(checkpoints, 10)
        rename = type(checkpoints.directory).rename

        def fail(path, to):
            if path.name.startswith(".pending"):
                raise OSError(5, "Input/output error")
            return rename(path, to)

        with monkeypatch.context() as patch:
            patch.setattr(type(checkpoints.directory), "rename", fail)
            checkpoints.save(10, small_state(10), {"position": 10}, {"eval/loss": 2.0})
            with pytest.raises(TrainingFailed, match=r"newest checkpoint is that of step 10"):
                checkpoints.wait()
        assert restored_step(checkpoints) == 10 and os.listdir(checkpoints.directory) == ["10"]


PRELUDE = """
import sys, jax, jax.numpy as jnp, numpy as np
from train.checkpoint import Checkpoints
from train.config import CheckpointConfig
from train.errors import TrainingFailed
def state(step):
    w = np.random.default_rng(step).random((4, 250_000), np.float32)  # does not compress
    return {"w": jnp.asarray(w), "step": jnp.int32(step)}
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep_last=2, keep_best=0))
"""
SAVE_FOR_EVER = (
    PRELUDE
    + """
step = checkpoints.latest_step() or 0
while True:
    step += 1
    checkpoints.save(step, state(step), {"position": step}, {})
    print(step, flush=True)
"""
)
DISK_FULL = (
    PRELUDE
    + """
import os, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints.save(1, state(1), {}, {})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
for attempt in range(2):
    try:
        checkpoints.save(2, state(2), {}, {})
        print("blocked no longer")
        checkpoints.wait()
    except TrainingFailed as error:
        print(error)
print(checkpoints.latest_step(), sorted(os.listdir(checkpoints.directory)))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoints.save(2, state(2), {}, {})
checkpoints.close()
print(checkpoints.latest_step())
"""
)


def start(script, directory):
    return subprocess.Popen(
        [sys.executable, "-c", script, str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


class TestProcesses:
    def test_killed_at_any_moment(self, tmp_path):
        draw = random.Random(1)
        asked = {
            "w": jax.ShapeDtypeStruct((4, 250_000), jnp.float32),
            "step": jax.ShapeDtypeStruct((), jnp.int32),
        }
        before = 0
        for _ in range(4):
            with start(SAVE_FOR_EVER, tmp_path) as process:
                saved = [int(process.stdout.readline()) for _ in range(3)]
                time.sleep(draw.uniform(0, 0.3))
                process.send_signal(signal.SIGKILL)
                process.communicate()
            # When the third save began, the second was complete.
            with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
                step, state, data_state, _ = checkpoints.restore(asked)
            assert step >= saved[1] > before
            assert data_state == {"position": step}
            assert int(state["step"]) == step
            assert np.array_equal(state["w"], np.random.default_rng(step).random((4, 250_000), np.float32))
            before = step

    def test_disk_full(self, tmp_path):
        with start(DISK_FULL, tmp_path) as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert not err
        lines = out.splitlines()
        failures = [
            line for line in lines if line.startswith("the checkpoint of step 2 could not be written: ")
        ]
        assert len(failures) == 2, out
        assert all(line.endswith("; the newest checkpoint is that of step 1") for line in failures)
        assert lines[-2:] == ["1 ['1']", "2"]

    def test_error_of_the_background_surfaces_at_the_next_save(self, checkpoints, monkeypatch):
        save_all(checkpoints, 1)

        def full(directory, lines):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("train.checkpoint.write_manifest", full)
            checkpoints.save(2, small_state(2), {"position": 2}, {})
            with pytest.raises(TrainingFailed, match=r"step 2 could not .*No space left on device"):
                checkpoints.save(3, small_state(3), {"position": 3}, {})
        assert restored_step(checkpoints) == 1
        save_all(checkpoints, 3)
        assert restored_step(checkpoints) == 3


def test_a_process_that_cannot_write_its_part_tells_process_0_at_once(checkpoints, monkeypatch, tmp_path):
    told = []

    def full():
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

    monkeypatch.setattr(checkpoints._checkpointer, "wait_until_finished", full)
    monkeypatch.setattr(processes, "exchange_texts", lambda text, topic: told.append(text))
    monkeypatch.setattr(processes, "tell_all", lambda text, topic: told[0])
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints._finish_part(1, tmp_path, "", "0")
    assert told == ["fault: RESOURCE_EXHAUSTED: No space left on device"]
    monkeypatch.undo()

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "exchange_texts", lambda mine, topic: [mine, *told])
    with pytest.raises(OSError, match="process 1 could not write its part: RESOURCE_EXHAUSTED"):
        checkpoint._all_hashes(tmp_path, "0")


def test_only_losses_over_as_many_tokens_are_compared(tmp_path):
    def extra(loss, tokens):
        return {"eval/loss": loss, "eval/tokens": tokens}

    with Checkpoints(tmp_path, CheckpointConfig(keep_last=1, keep_best=1)) as checkpoints:
        assert checkpoints.would_be_best(extra(3.0, 10))
        for step, (loss, tokens) in enumerate([(1.0, 99), (3.0, 10), (2.0, 10), (2.5, 10)]):
            checkpoints.save(step, small_state(step), {}, extra(loss, tokens))
        assert checkpoints.would_be_best(extra(1.9, 10)) and not checkpoints.would_be_best(extra(2.0, 10))
        assert not checkpoints.would_be_best(extra(float("nan"), 10))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


def test_the_evaluation_of_a_garbled_older_checkpoint_does_not_count(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep_last=3, keep_best=1)) as checkpoints:
        for step, loss in enumerate([1.0, 3.0]):
            checkpoints.save(step, small_state(step), {}, {"eval/loss": loss})
        checkpoints.wait()
        assert not checkpoints.would_be_best({"eval/loss": 2.0})
        for garbled in (b"{", b"[]", b"\xff", b'{"extra": 3}'):
            (tmp_path / "0" / "record.json").write_bytes(garbled)
            assert checkpoints.would_be_best({"eval/loss": 2.0}), garbled
