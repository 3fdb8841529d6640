"""Whether a folder still grows: a slow disk takes long, one that does not answer takes for ever."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from train import clock

LOOK_SECONDS = 5.0


class Growth:
    """Looks at a folder in a thread of its own: where the disk does not answer, it waits for ever.

    Args:
      folder: need not exist.

    Fields:
      seen_at: when the size of its files was last found changed; at first, when this was made.
    """

    def __init__(self, folder: Path):
        self.seen_at = clock.now()
        self._folder, self._stop = folder, threading.Event()
        threading.Thread(target=self._look, name="growth", daemon=True).start()

    def stop(self) -> None:
        """Look no longer."""
        self._stop.set()

    def _look(self) -> None:
        size = 0
        while not self._stop.wait(LOOK_SECONDS):
            before, size = size, size_of(self._folder)
            if size != before:
                self.seen_at = clock.now()


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; what disappears meanwhile counts as nothing."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return size
