"""One run per directory: a lock that the operating system lets go when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

from train.errors import ConfigError


class RunLock:
    """Holds `<run>/.lock` until closed or until the process ends.

    Args:
      run_dir: an existing run directory.

    Raises:
      ConfigError: another run holds the lock.
    """

    def __init__(self, run_dir: str | os.PathLike[str]):
        self._file = (Path(run_dir) / ".lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise ConfigError("workdir", run_dir, f"is in use by {holder}; wait for it or stop it") from None
        except OSError as error:
            # Some cluster file systems have no locks; training there must still be possible.
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                self._file.close()
                raise
            logging.getLogger("moejax").warning("%s cannot be locked: %s", run_dir, error.strerror)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()

    def __enter__(self) -> RunLock:
        """Hold the lock for the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release it."""
        self.close()

    def close(self) -> None:
        """Release the lock."""
        self._file.close()
