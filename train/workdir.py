"""The directory of a run: named by the user or claimed for a new run, and able to hold a checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import resource
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import jax

from train.errors import ConfigError
from train.paths import expanded

log = logging.getLogger("moejax")

_DATA_FILE = 2**31  # bytes from which on Orbax begins another file
# The share of a state that is surely written: parameters hardly compress, and with two moments they are a third of it.
_INCOMPRESSIBLE = 0.25
# The longest path in a checkpoint that is being written; the last part is a hash.
_LONGEST = "{step}/state.orbax-checkpoint-tmp/ocdbt.process_{process}/d/" + 32 * "0"


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
                where = f"{error.filename or probe.parent}: {error.strerror}"
                raise ConfigError("workdir", self.path, f"cannot hold a checkpoint: {where}") from error
            finally:
                shutil.rmtree(probe, ignore_errors=True)
                if not there_before:
                    with contextlib.suppress(OSError):
                        probe.parent.rmdir()

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


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
