"""Scalars and the experts' load as TensorBoard event files, written at once.

Not through tensorboardX's `SummaryWriter`: it writes in a thread behind a queue of ten, and when the disk is
full the thread ends and a later step waits for ever.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


class Board:
    """An event file in `directory` for a run that goes on after `start_step`.

    Readers forget what earlier files say about later steps.
    """

    def __init__(self, directory: str | os.PathLike[str], start_step: int):
        # Only here: a run that does not want TensorBoard should not pay for its import.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

        self._event, self._summary, self._histogram = Event, Summary, HistogramProto
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

    def write_load(self, step: int, loads: Sequence[np.ndarray]) -> None:
        """Write the load of each expert of each MoE layer: as one picture, and as a histogram per layer.

        A pixel is an expert, a row of them a layer; white has no token (or is no expert), black twice its even share or
        more.

        Args:
          loads: of each layer its experts' loads.
        """
        shares = [load_E / np.maximum(np.mean(load_E), 1e-9) for load_E in loads]
        share_ME = np.zeros((len(shares), max(map(len, shares))))
        for row_E, share_E in zip(share_ME, shares, strict=True):
            row_E[: len(share_E)] = share_E
        pixels = np.repeat(np.repeat(255 - np.minimum(share_ME * 127.5, 255), 12, axis=0), 12, axis=1)
        picture = self._summary.Image(
            height=pixels.shape[0],
            width=pixels.shape[1],
            colorspace=1,
            encoded_image_string=png(pixels.astype(np.uint8)),
        )
        values = [self._summary.Value(tag="moe/load", image=picture)]
        for layer, share_E in enumerate(shares):
            counts, edges = np.histogram(share_E, bins=20, range=(0, max(2.0, share_E.max())))
            histogram = self._histogram(
                min=share_E.min(),
                max=share_E.max(),
                num=len(share_E),
                sum=share_E.sum(),
                sum_squares=(share_E**2).sum(),
                bucket_limit=edges[1:].tolist(),
                bucket=counts.tolist(),
            )
            values.append(self._summary.Value(tag=f"moe/load_share/{layer}", histo=histogram))
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=values))
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def png(pixels: np.ndarray) -> bytes:
    """A grey picture [height, width] u8 as a PNG file."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # each row begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body
