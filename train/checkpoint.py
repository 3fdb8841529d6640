"""Checkpoints: written by Orbax in the background, hashed, committed by one rename, verified when read.

checkpoints/
  500/                 exists only when complete
    state/             Orbax: the state's leaves by dotted name
    record.json        step, data state, extra, shapes and dtypes of the leaves
    manifest.sha256    a hash per file, from the process that wrote the file
  .pending-1000/       being written, or left by a killed process; the next save sweeps it away
  .discarded-100/      being removed
  .replaced-500/       makes room for a new 500; put back where a kill has left no 500
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from train import clock, processes
from train import leaves as lv
from train.checkpoint_files import RECORD, checkpoint_steps, read_record
from train.config import CheckpointConfig
from train.ending import end_at_once, end_soon
from train.errors import ConfigError, SaveStuck, TrainingFailed
from train.fields import shown
from train.growth import Growth
from train.integrity import (
    find_fault,
    find_strays,
    hash_lines,
    sync_directory,
    write_durably,
    write_manifest,
)

log = logging.getLogger("moejax")

BEST, EXTENT = "eval/loss", "eval/tokens"
"""The entries of `extra` by which the best checkpoint is chosen: the lowest loss among those over as many tokens."""
EVALUATED = "eval/tokens_evaluated"
"""The entry of `extra` that has the tokens of the whole evaluation; those above may be only its first ones."""

SAVE_SECONDS = 600
"""For how long the files of a checkpoint need not grow, without the time in which the run is suspended."""
_WALL_SECONDS = 24 * 3600
"""The same for Orbax, which goes by the clock on the wall: more than a suspended run may sleep."""

_saves = (
    itertools.count()
)  # of this process: what the processes tell each other about one save has its number
_FAULT = "fault: "  # how a process tells process 0 of an error instead of its hashes


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax talks at length through absl and asyncio, also about errors that are raised here anyway."""
    return "orbax" not in record.pathname and "orbax" not in record.getMessage()


for _name in ("absl", "asyncio"):
    logging.getLogger(_name).addFilter(_not_from_orbax)


def _report_unraisable(args: sys.UnraisableHookArgs) -> None:
    """Where a write fails, Orbax closes its event loop, to which the threads of its storage still report.

    Each of them would print a traceback; the error itself is raised here anyway.
    """
    if str(args.exc_value) != "Event loop is closed":
        _report_other_unraisable(args)


_report_other_unraisable = sys.unraisablehook
sys.unraisablehook = _report_unraisable


class Checkpoints:
    """The checkpoints of one run. All processes call every method, in the same order.

    Nothing is written before the first `save`, so that a reader may look at a running training.

    Args:
      directory: `<run>/checkpoints`, on a file system that all processes share.
      config: how many are kept, and whether a save waits until it is complete.
    """

    def __init__(self, directory: str | os.PathLike[str], config: CheckpointConfig):
        self.directory = Path(directory).absolute()
        self._config = config
        self._primary = jax.process_index() == 0
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(), timeout_secs=_WALL_SECONDS)
        self._finisher = ThreadPoolExecutor(1, "checkpoint")
        # Its step, its end, and whether its files still grow.
        self._saving: tuple[int, Future[None], Growth] | None = None
        # When the newest save began, or this run, and how long the caller waited for its copy.
        self._times = clock.now(), 0.0
        self._damaged: set[int] = set()
        self._swept = False
        self._mentioned = False

    def __enter__(self) -> Checkpoints:
        """Close at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the save in progress."""
        self.close()

    # ---- saving ----

    def save(self, step: int, state: Any, data_state: dict[str, Any], extra: dict[str, Any]) -> None:
        """Begin to save; return when the state has been copied, so that its buffers may be donated.

        With `checkpoint.wait` return when the checkpoint is complete. A save still in progress is waited for first.
        A checkpoint of the same step is replaced; those of later steps belong to a future that the run has left, and
        are removed when this one is complete.

        Args:
          step: finished optimizer steps.
          state: tree of `jax.Array`, sharded in any way; every dtype, also typed random keys.
          data_state: JSON; the same on all processes.
          extra: small JSON; the same on all processes. `keep_best` goes by `extra["eval/loss"]`, if there,
            among those of the same `extra["eval/tokens"]`.

        Raises:
          TrainingFailed: this or the previous save could not be written.
        """
        began = clock.now()
        self.wait()
        leaves = lv.named_leaves(state)
        described = lv.description(leaves)
        record = json.dumps(
            {"step": step, "data_state": data_state, "extra": extra, "leaves": described}, indent=1
        )
        pending = self.directory / f".pending-{step}"
        stuck = SaveStuck(step, SAVE_SECONDS)
        try:
            with clock.unless_done_within(SAVE_SECONDS, lambda: end_at_once(stuck)):
                if self._primary:
                    self._sweep()
                    pending.mkdir(parents=True)
                # Orbax refuses arrays without elements; their shape and dtype say all about them.
                arrays = {name: lv.stored(leaf) for name, leaf in leaves.items() if leaf.size}
                self._checkpointer.save(pending / "state", args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            raise self._failure(step, error) from error
        finish = self._finish if self._primary else self._finish_part
        self._times = began, clock.now() - began
        done = self._finisher.submit(finish, step, pending, record, str(next(_saves)))
        growth = Growth(pending)
        done.add_done_callback(lambda _: growth.stop())
        self._saving = step, done, growth
        if self._config.wait:
            self.wait()

    def _finish(self, step: int, pending: Path, record: str, topic: str) -> None:
        """In the background of process 0: wait for Orbax, collect the hashes, commit by one rename, prune."""
        fault = ""
        try:
            self._checkpointer.wait_until_finished()
            write_durably(pending / RECORD, record)
            write_manifest(pending, _all_hashes(pending, topic))
            replaced = self._put_aside(step, "replaced")
            pending.rename(self.directory / str(step))
            sync_directory(self.directory)
            shutil.rmtree(replaced, ignore_errors=True)
        except Exception as error:
            fault = str(error)
            raise
        finally:
            if jax.process_count() > 1:
                processes.tell_all(fault, f"written/{topic}")
        self._damaged.discard(step)
        began, blocked = self._times
        whole = clock.now() - began
        log.info(
            "checkpoint of step %d: written in %.2f s; the steps waited %.2f s of it",
            *(step, whole, whole if self._config.wait else blocked),
        )
        self._prune(step)

    def _finish_part(self, step: int, pending: Path, record: str, topic: str) -> None:
        """In the background of the others: hash what this process has written; done when process 0 has committed."""
        try:
            self._checkpointer.wait_until_finished()
            lines = hash_lines(pending, jax.process_index())
        except Exception as error:
            lines = f"{_FAULT}{error}"
        processes.exchange_texts(lines, f"hashes/{topic}")
        if fault := processes.tell_all("", f"written/{topic}"):
            raise OSError(fault)

    def _prune(self, newest: int) -> None:
        """Keep the newest and the best of the sound ones up to `newest`."""
        sound = [step for step in self.steps() if step <= newest and step not in self._damaged]
        losses = self._comparable_losses(sound)
        best = set(sorted(losses, key=lambda step: (losses[step], -step))[: self._config.keep_best])
        keep = best.union(sound[-max(1, self._config.keep_last) :])
        for step in self.steps():
            if step not in keep:
                self._discard(step)

    def _discard(self, step: int) -> None:
        """Remove a checkpoint; renamed first, so that a kill in between leaves no half of one."""
        shutil.rmtree(self._put_aside(step, "discarded"), ignore_errors=True)

    def _put_aside(self, step: int, why: str) -> Path:
        """Where a checkpoint has been moved, if there was one."""
        aside = self.directory / f".{why}-{step}"
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            (self.directory / str(step)).rename(aside)
        return aside

    def _sweep(self) -> None:
        """Remove what a killed or failed save left. Only the process that writes does this."""
        if not self._swept and self.directory.is_dir():
            self._put_back()
            for pattern in (".pending-*", ".discarded-*"):
                for path in self.directory.glob(pattern):
                    shutil.rmtree(path, ignore_errors=True)
        self._swept = True

    def _put_back(self) -> None:
        """Undo a replacement that was cut short between its two renames, or end one that was cut short after them."""
        for aside in self.directory.glob(".replaced-*"):
            place = self.directory / aside.name.removeprefix(".replaced-")
            if place.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.rename(place)

    def _failure(self, step: int, error: Exception) -> TrainingFailed:
        """The error that reports a failed save; its half-written files are removed to make room."""
        self._swept = False
        if self._primary:
            self._sweep()
        reason = " ".join(str(error).split())
        return TrainingFailed(
            f"the checkpoint of step {step} could not be written: {reason}; {self.describe()}"
        )

    def describe(self) -> str:
        """Which checkpoint there is to go on from, for messages."""
        newest = self.latest_step()
        return (
            "there is no checkpoint yet"
            if newest is None
            else f"the newest checkpoint is that of step {newest}"
        )

    def wait(self) -> None:
        """Finish the save in progress.

        Raises:
          TrainingFailed: it could not be written, for instance because the disk is full. Earlier
            checkpoints are intact.
          SaveStuck: its files have not grown for `SAVE_SECONDS`, for instance because the disk does not answer. The
            process ends soon after, also where it closes files on that disk and never returns.
        """
        if self._saving is None:
            return
        step, done, growth = self._saving
        while not done.done():
            if clock.now() - growth.seen_at >= SAVE_SECONDS:
                stuck = SaveStuck(step, SAVE_SECONDS)  # nothing here may ask the disk
                end_soon(stuck)
                raise stuck
            futures.wait([done], timeout=clock.TICK_SECONDS)
        self._saving = None
        try:
            done.result()
        except Exception as error:
            raise self._failure(step, error) from error

    def close(self) -> None:
        """Finish the save in progress and end the threads. Raises like `wait`; the threads of a stuck save go on."""
        try:
            self.wait()
        finally:
            if self._saving is None:
                self._finisher.shutdown()
                self._checkpointer.close()

    # ---- looking ----

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first; some may have been damaged since."""
        return checkpoint_steps(self.directory)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint that is not known to be damaged. Only restoring verifies it."""
        return max((step for step in self.steps() if step not in self._damaged), default=None)

    def is_late(self) -> bool:
        """Whether the minutes after which there is to be another checkpoint have passed."""
        minutes = self._config.every_minutes
        return minutes > 0 and processes.from_first(clock.now() - self._times[0] >= 60 * minutes)

    def would_be_best(self, extra: dict[str, Any]) -> bool:
        """Whether a checkpoint with this `extra`, which has an evaluation loss, is to be made and kept as the best.

        A save in progress is finished first; raises like `wait`.
        """
        self.wait()
        return self._config.every > 0 and processes.from_first(self._is_better_than_all(extra))

    def _is_better_than_all(self, extra: dict[str, Any]) -> bool:
        loss, tokens = extra[BEST], extra.get(EXTENT)
        evaluated = [self._evaluation(step) for step in self.steps() if step not in self._damaged]
        others = [other for other, extent in filter(None, evaluated) if extent == tokens]
        return self._config.keep_best > 0 and math.isfinite(loss) and loss < min(others, default=math.inf)

    def _comparable_losses(self, steps: list[int]) -> dict[int, float]:
        """Evaluation loss of each checkpoint evaluated over as many tokens as the last of them that was at all."""
        evaluations = {step: found for step in steps if (found := self._evaluation(step)) is not None}
        if not evaluations:
            return {}
        _, extent = evaluations[max(evaluations)]
        return {step: loss for step, (loss, tokens) in evaluations.items() if tokens == extent}

    def _evaluation(self, step: int) -> tuple[float, int | None] | None:
        """Evaluation loss of a checkpoint and its number of tokens; None when it has no finite one."""
        try:
            extra = read_record(self.directory, step)["extra"]
            loss, extent = extra.get(BEST), extra.get(EXTENT)
        except Exception:  # damaged: its record may hold anything
            return None
        return (loss, extent) if isinstance(loss, int | float) and math.isfinite(loss) else None

    # ---- restoring ----

    def recover(self) -> None:
        """Mend what a kill has left. Only a run that holds the lock of its workdir may, before it restores."""
        if self._primary:
            self._put_back()

    def restore(
        self,
        abstract_state: Any,
        step: int | None = None,
        accept: Callable[[dict[str, Any]], None] = lambda data_state: None,
    ) -> tuple[int, Any, dict[str, Any], dict[str, Any]] | None:
        """Read the newest sound checkpoint, bit by bit as it was saved.

        A save in progress is finished first. A damaged checkpoint is skipped with a warning that names its
        step and the bad file.

        Args:
          abstract_state: tree of `jax.ShapeDtypeStruct` with shardings, which may be of another mesh than at
            saving.
          step: only this checkpoint.
          accept: is given the data state before the state is read, and may refuse it by raising.

        Returns:
          (step, state, data_state, extra), or None when there is no checkpoint at all.

        Raises:
          ConfigError: there are checkpoints but none is sound (starting over would overwrite what a hand
            may still rescue); the state has other leaves, shapes or dtypes; there is none of `step`.
        """

        def read(found: int, record: dict[str, Any]) -> Any:
            accept(record["data_state"])
            state = self._read(found, record["leaves"], abstract_state, prefix="")
            return found, state, record["data_state"], record["extra"]

        return self._from_newest(step, read)

    def restore_params(
        self, abstract_params: Any, step: int | None = None
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """Read only `state.params`, without knowledge of the optimizer.

        Returns (step, params, extra) or None; arguments and errors are those of `restore`.
        """

        def read(found: int, record: dict[str, Any]) -> Any:
            params = self._read(found, record["leaves"], abstract_params, prefix="params.")
            return found, params, record["extra"]

        return self._from_newest(step, read)

    def _from_newest(self, only: int | None, read: Callable[[int, dict[str, Any]], Any]) -> Any:
        """What `read(step, record)` gives of the newest sound checkpoint; None when there is none at all.

        A running training may remove or replace that one meanwhile: then the newest of the others is read.
        """
        while (found := self._newest_sound(only)) is not None:
            folder = self.directory / str(found)
            before = _identity(folder)
            try:
                result = read(found, read_record(self.directory, found))
            except Exception:
                if before is not None and _identity(folder) == before:
                    raise
            else:
                if _identity(folder) == before:
                    return result
        return None

    def _newest_sound(self, only: int | None) -> int | None:
        """The newest checkpoint whose files all have their hashes; all processes come to the same answer."""
        self.wait()
        rejected: dict[int, str] = {}
        while True:
            untried = [step for step in self.steps() if step not in rejected and only in (None, step)]
            step = _from_primary(max(untried, default=-1))
            if step < 0:
                break
            path = self.directory / str(step)
            self._mention_strays(path)
            fault = _first_fault(find_fault(path, (jax.process_index(), jax.process_count())))
            if fault is None:
                return step
            # A running training may have removed it while a reader looked.
            if path.is_dir():
                rejected[step] = fault
                self._damaged.add(step)
                log.warning("checkpoint of step %d is damaged and skipped: %s", step, fault)
        if rejected:
            faults = "; ".join(f"step {step}: {fault}" for step, fault in rejected.items())
            rule = f"none of its checkpoints is sound ({faults}); start over in another workdir"
            raise ConfigError("workdir", self.directory.parent, rule)
        if only is not None:
            raise ConfigError("step", only, f"no such checkpoint; there are {self.steps()}")
        return None

    def _mention_strays(self, path: Path) -> None:
        """One line in a run's log about the first files that are not ours."""
        if self._primary and not self._mentioned and (strays := find_strays(path)):
            self._mentioned = True
            log.warning(
                "checkpoint of step %s has files of other programs: %s", path.name, shown(", ".join(strays))
            )

    def _read(self, step: int, saved: dict[str, str], abstract: Any, prefix: str) -> Any:
        """The leaves whose names begin with `prefix`, in the structure of `abstract`."""
        wanted = {prefix + name: leaf for name, leaf in lv.named_leaves(abstract).items()}
        there = {name: text for name, text in saved.items() if name.startswith(prefix)}
        if unlike := lv.difference(there, lv.description(wanted)):
            raise ConfigError("workdir", self.directory.parent, f"step {step} holds another state: {unlike}")
        plain = {name: lv.stored_abstract(leaf) for name, leaf in wanted.items()}
        present = {name: leaf for name, leaf in plain.items() if leaf.size}
        args = ocp.args.PyTreeRestore(
            present,
            restore_args={
                name: ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
                for name, leaf in present.items()
            },
            partial_restore=True,
        )
        arrays = self._checkpointer.restore(self.directory / str(step) / "state", args=args)
        for name, leaf in plain.items():
            if name not in present:
                arrays[name] = jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
        restored = [lv.revived(leaf, arrays[name]) for name, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract), restored)


def _all_hashes(pending: Path, topic: str) -> str:
    """The manifest's lines from all processes, in process 0."""
    mine = hash_lines(pending)
    if jax.process_count() == 1:
        return mine
    texts = processes.exchange_texts(mine, f"hashes/{topic}") or []
    for number, text in enumerate(texts):
        if text.startswith(_FAULT):
            raise OSError(f"process {number} could not write its part: {text.removeprefix(_FAULT)}")
    return "".join(texts)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Device and inode of a folder, which another one of the same name does not share; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _from_primary(step: int) -> int:
    """Process 0's step, on all processes."""
    if jax.process_count() == 1:
        return step
    return int(multihost_utils.broadcast_one_to_all(np.int32(step)))


def _first_fault(fault: str | None) -> str | None:
    """The fault that any process found, on all processes."""
    if jax.process_count() == 1:
        return fault
    text = np.zeros(200, np.uint8)
    encoded = np.frombuffer((fault or "").encode()[: text.size], np.uint8)
    text[: encoded.size] = encoded
    for found in np.asarray(multihost_utils.process_allgather(text)):
        if found.any():
            return found.tobytes().rstrip(b"\0").decode(errors="replace")
    return None
