"""Who gets what is logged to `logging.getLogger("moejax")`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def logged_to(handlers: Sequence[logging.Handler]) -> Iterator[None]:
    """Within the block these handlers alone get what moejax logs; afterwards those from before do again."""
    logger = logging.getLogger("moejax")
    before, propagate = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = list(handlers), False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before, propagate


@contextlib.contextmanager
def held_back() -> Iterator[list[logging.LogRecord]]:
    """Collect what is logged in the block, while there is no monitor to show it; give it to one by `log.handle`."""
    collector = _Collector()
    with logged_to([collector]):
        yield collector.records


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.records.append(record)
