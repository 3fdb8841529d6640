"""One run per directory: a lock that the operating system lets go when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from train.errors import ConfigError
from train.paths import in_the_way


@contextlib.contextmanager
def lock_run(run_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Hold `<run>/.lock` for the block; called by process 0 of a run.

    Args:
      run_dir: an existing run directory.

    Raises:
      ConfigError: another run holds the lock, or the directory cannot be written to.
    """
    path = Path(run_dir) / ".lock"
    try:
        opened = path.open("a+")
    except OSError as error:
        raise in_the_way(run_dir, path, error) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise ConfigError("workdir", run_dir, f"is in use by {holder}; wait for it or stop it") from None
        except OSError as error:
            # Some cluster file systems have no locks; training there must still be possible.
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            logging.getLogger("moejax").warning("%s cannot be locked: %s", run_dir, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        file.flush()
        yield
