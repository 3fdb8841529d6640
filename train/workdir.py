"""The directory of a run: named by the user or claimed for a new run, and able to hold a checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import jax

from train.data.huggingface import CONFIG_FILE
from train.data.tokenizer import TOKENIZER_FILE
from train.errors import ConfigError
from train.metrics import FILE_NAME as METRICS
from train.metrics import SHORTER
from train.paths import expanded, in_the_way
from train.reading import regular
from train.writing import scratch_of

log = logging.getLogger("moejax")

_DATA_FILE = 2**31  # bytes from which on Orbax begins another file
# The share of a state that is surely written: parameters hardly compress, and with two moments they are a third of it.
_INCOMPRESSIBLE = 0.25
# The longest path in a checkpoint that is being written; the last part is a hash.
_LONGEST = "{step}/state.orbax-checkpoint-tmp/ocdbt.process_{process}/d/" + 32 * "0"

# Files of a run: those that it writes at their place, and those that it replaces by a rename.
_WRITTEN = (METRICS, METRICS + SHORTER, "log.txt")
_REPLACED = ("config.yaml", TOKENIZER_FILE, CONFIG_FILE)


class Workdir:
    """A run's directory, which need not exist yet.

    Args:
      named: as the user named it; None: a new one, `runs/<name>-<date>-<time>`.
      name: of the config.

    Raises:
      ConfigError: see `expanded`.

    Fields:
      path: where it is; of a new one where it would be, until `make` has claimed it.
      is_new: whether no earlier run may lie there.
    """

    def __init__(self, named: str | None, name: str):
        self.is_new = named is None
        self.path = expanded("workdir", named or f"runs/{name}-{datetime.now():%Y%m%d-%H%M%S}")
        self._made: list[Path] = []

    def make(self) -> None:
        """Create it. Of two new runs of the same second each gets a directory of its own.

        Raises:
          ConfigError: it cannot be created.
        """
        first = self.path
        try:
            for number in itertools.count(2):
                missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
                try:
                    self.path.mkdir(parents=True, exist_ok=not self.is_new)
                    break
                except FileExistsError:
                    if not self.is_new or not self.path.is_dir():
                        raise
                    self.path = first.with_name(f"{first.name}-{number}")
        except OSError as error:
            raise ConfigError("workdir", self.path, f"cannot be created: {error.strerror}") from error
        self._made += missing
        self.is_new = False

    def require_room(self, state_bytes: int, step: int) -> None:
        """Find out before the first step whether a checkpoint can be written.

        It is written compressed, never to less than a quarter: with less room than that the run is refused, with less
        than the whole there is a warning.

        Args:
          state_bytes: what a checkpoint holds.
          step: the last one, which has the longest name.

        Raises:
          ConfigError: no space, no right to write, a file in the way, too long a path. What `make` made is removed.
        """
        with self._removed_if_refused():
            self._compare_with_limits(state_bytes)
            probe = self.path / "checkpoints" / f".pending-{step}"
            there_before = probe.parent.exists()
            try:
                file = probe.parent / _LONGEST.format(step=probe.name, process=jax.process_count() - 1)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(b"0")
            except OSError as error:
                raise in_the_way(self.path, error.filename or probe.parent, error) from error
            finally:
                shutil.rmtree(probe, ignore_errors=True)
                if not there_before:
                    with contextlib.suppress(OSError):
                        probe.parent.rmdir()

    def require_places(self, *, tensorboard: bool) -> None:
        """Find out before anything is written whether something is in the way of the files of a run.

        Args:
          tensorboard: whether the run writes for it.

        Raises:
          ConfigError: names the path. What `make` made is removed.
        """
        with self._removed_if_refused():
            for name in (*_WRITTEN, *_REPLACED, *map(scratch_of, _REPLACED)):
                # Not made for a trial: a kill would leave an empty one, and who looks would see it come and go.
                if os.path.lexists(self.path / name):
                    _try_file(self.path, self.path / name)
            for name in ("checkpoints", "logs", *["tensorboard"] * tensorboard):
                _try_folder(self.path, self.path / name)

    def _compare_with_limits(self, state_bytes: int) -> None:
        checkpoints = self.path / "checkpoints"  # may be a link to another disk
        disk = checkpoints if checkpoints.is_dir() else self.path
        free = shutil.disk_usage(disk).free
        largest_file, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        if largest_file == resource.RLIM_INFINITY:
            largest_file = _DATA_FILE
        for what, size, needed in (
            ("on its disk, free are only", free, state_bytes),
            (
                "under the limit of a file's size (ulimit -f), which is",
                largest_file,
                min(state_bytes, _DATA_FILE),
            ),
        ):
            rule = f"room for a checkpoint of {_megabytes(state_bytes)} {what} {_megabytes(size)}"
            if size < needed * _INCOMPRESSIBLE:
                raise ConfigError("workdir", self.path, f"has no {rule}")
            if size < needed:
                log.warning("workdir = %s: has hardly %s", self.path, rule)

    @contextlib.contextmanager
    def _removed_if_refused(self) -> Iterator[None]:
        try:
            yield
        except ConfigError:
            with contextlib.suppress(OSError):
                if self._made:
                    (self.path / ".lock").unlink(missing_ok=True)
                for path in self._made:
                    os.rmdir(path)
            raise


def _try_file(workdir: Path, path: Path) -> None:
    """Open a file as a run will, without a change to it."""
    is_new = not path.exists()
    try:
        if not is_new:
            regular(path)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT))
        if is_new:
            path.resolve().unlink()  # where a link led
    except OSError as error:
        raise in_the_way(workdir, path, error) from error


def _try_folder(workdir: Path, path: Path) -> None:
    is_new = not path.exists()
    try:
        path.mkdir(exist_ok=True)
        try:
            tempfile.TemporaryFile(dir=path).close()
        finally:
            if is_new:
                path.rmdir()
    except OSError as error:
        raise in_the_way(workdir, path, error) from error


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
