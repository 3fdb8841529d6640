"""Scalars as TensorBoard event files, written at once.

Not through tensorboardX's `SummaryWriter`: it writes in a thread behind a queue of ten, and when the disk is
full the thread ends and a later step waits for ever.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path


class Board:
    """An event file in `directory` for a run that goes on after `start_step`.

    Readers forget what earlier files say about later steps.
    """

    def __init__(self, directory: str | os.PathLike[str], start_step: int):
        # Only here: a run that does not want TensorBoard should not pay for its import.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        self._event, self._summary = Event, Summary
        Path(directory).mkdir(parents=True, exist_ok=True)
        # The writer's own names repeat within a second, and a second file of a name overwrites the first.
        suffix = f".{os.getpid()}.{start_step}"
        self._writer = EventsWriter(os.path.join(directory, "events"), suffix)
        first = start_step + 1 if start_step else 0
        started = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first, session_log=started))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write scalars of one step, and flush."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
