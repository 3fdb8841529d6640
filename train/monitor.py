"""One place to report to: `metrics.jsonl`, `log.txt`, TensorBoard and the terminal of a run."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from train import clock
from train.config import LogConfig
from train.ending import CLOSE_SECONDS, end_at_once, note_by
from train.errors import RunError, TrainingFailed
from train.logs import logged_to
from train.metrics import EVALUATION, FILE_NAME, LAYERS, Metrics
from train.tensorboard import Board
from train.terminal import Terminal, make_terminal
from train.watch import ExpertWatch


class Monitor:
    """Reports a run; made once, by process 0.

    A resumed run goes on at the step of its checkpoint: lines of later steps are cut from `metrics.jsonl`, and
    TensorBoard forgets them. A run from step 0 starts both afresh.

    All that is logged to `logging.getLogger("moejax")` goes to `log.txt` and to the terminal, above its bar.
    A terminal that has gone away is no reason to stop training; a full disk is.

    Args:
      run_dir: an existing run directory.
      config: what is reported.
      total_steps: steps of the whole run.
      start_step: finished steps of the checkpoint from which the run goes on; 0 without one.
      evaluated: whether the evaluation after that step, if one was due, has been done too.
      tokens_per_step: tokens of one optimizer step over all devices.
      mfu_per_token: model FLOPs utilisation per token/s; unset where the devices' peak is not known.
      stream: the terminal; standard error unless given. Live when it is a terminal, plain lines otherwise.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        config: LogConfig,
        *,
        total_steps: int,
        start_step: int,
        tokens_per_step: int,
        evaluated: bool = True,
        mfu_per_token: float | None = None,
        stream: TextIO | None = None,
    ):
        run_dir = self._run_dir = Path(run_dir)
        self._tokens_per_step = tokens_per_step
        self._total_steps, self._experts_every = total_steps, config.experts_every
        self._watch = ExpertWatch(config.drop_limit, config.dead_after)
        self._mfu_per_token = mfu_per_token
        self._metrics = Metrics(run_dir / FILE_NAME)
        self._metrics.truncate_after(start_step if start_step else -1, evaluated=evaluated)
        self._board = Board(run_dir / "tensorboard", start_step) if config.tensorboard else None
        self._terminal = make_terminal(stream or sys.stderr, total_steps, start_step)

        self._logger = logging.getLogger("moejax")
        self._level_before = self._logger.level
        self._logger.setLevel(logging.INFO)
        self._file_handler = _LogFile(run_dir / "log.txt", encoding="utf-8")
        self._file_handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._terminal_handler = _TerminalHandler(self._terminal)
        self._logging = contextlib.ExitStack()
        self._logging.enter_context(logged_to([self._file_handler, self._terminal_handler]))
        self._last_step, self._last_time = start_step, clock.now()
        note_by(self._note)

    def __enter__(self) -> Monitor:
        """Close at the end of the block."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        """Leave the terminal in order and close every file; the last line of `log.txt` says what ended the run.

        Where the disk does not answer, the process ends with the error.
        """
        with contextlib.suppress(OSError):
            self._terminal.close()
        rule = f"the files in {self._run_dir} could not be closed within {CLOSE_SECONDS} s; look at the disk"
        stuck = error if isinstance(error, RunError) else TrainingFailed(rule)
        with clock.unless_done_within(CLOSE_SECONDS, lambda: end_at_once(stuck)):
            if error is not None:
                self._note(error)
            self.close()

    def _note(self, error: BaseException) -> None:
        """Write into `log.txt` alone what ends the run: the terminal gets its line from whoever handles the error."""
        text = f"ended by {type(error).__name__}: {' '.join(str(error).split())}"
        record = self._logger.makeRecord("moejax", logging.ERROR, "", 0, text, (), None)
        self._file_handler.handle(record)  # opens the file again after `close`

    def train(self, step: int, metrics: Mapping[str, float], layers: Mapping[str, Any] | None = None) -> None:
        """Report a logged step; with the numbers of each MoE layer (`moe/layers/...`), if it is one of those that do.

        Adds `tokens` (since step 0), `step_seconds` and `tokens_per_second` (means over the steps since the
        last report, pauses left out; the first ones have the compilation in them) unless `metrics` has them,
        and `mfu` where the peak is known.

        Raises:
          TrainingFailed: the line could not be written.
        """
        now = clock.now()
        seconds = (now - self._last_time) / max(1, step - self._last_step)
        self._last_step, self._last_time = step, now
        record = {
            "step": step,
            "tokens": step * self._tokens_per_step,
            "tokens_per_second": self._tokens_per_step / max(seconds, 1e-9),
            "step_seconds": seconds,
        } | dict(metrics)
        if self._mfu_per_token is not None:
            record["mfu"] = record["tokens_per_second"] * self._mfu_per_token
        layers = layers or {}
        shown = layers if self._shows_experts(step) else {}
        self._write(step, record, {LAYERS + name: value for name, value in shown.items()})
        with contextlib.suppress(OSError):
            self._terminal.train(step, record)
        for warning in self._watch(step, record, layers):
            self._logger.warning("%s", warning)

    def evaluation(self, step: int, loss: float, experts: Mapping[str, Any] | None = None) -> None:
        """Report the evaluation loss after `step` steps, in a line of its own; raises like `train`.

        Args:
          experts: what it found of the experts, see `ExpertView.metrics`; `eval/` is put before each name.
        """
        named = {f"eval/{name}": value for name, value in (experts or {}).items()}
        layers = {name: value for name, value in named.items() if LAYERS in name}
        scalars = {name: value for name, value in named.items() if name not in layers}
        self._write(step, {"step": step, EVALUATION: loss, **scalars}, layers)
        with contextlib.suppress(OSError):
            self._terminal.evaluation(step, loss)

    def evaluating(self, done: int, total: int) -> None:
        """Show how many batches of an evaluation are done."""
        with contextlib.suppress(OSError):
            self._terminal.evaluating(done, total)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of a block, such as an evaluation, out of the time per step."""
        began = clock.now()
        try:
            yield
        finally:
            self._last_time += clock.now() - began

    def close(self) -> None:
        """Close every file and leave the terminal in order; a second call does nothing."""
        with contextlib.suppress(OSError):
            self._terminal.close()
        self._logging.close()
        for handler in (self._file_handler, self._terminal_handler):
            with contextlib.suppress(OSError):  # what a full disk did not take is tried once more here
                handler.close()
        self._logger.setLevel(self._level_before)
        self._metrics.close()
        if self._board is not None:
            with contextlib.suppress(OSError):  # a full disk has been reported by then
                self._board.close()
            self._board = None

    def _shows_experts(self, step: int) -> bool:
        every = self._experts_every
        return every > 0 and (step % every == 0 or step in (1, self._total_steps))

    def _write(self, step: int, record: Mapping[str, float], layers: Mapping[str, Any]) -> None:
        try:
            self._metrics.append({**record, **layers})
            if self._board is not None:
                if LAYERS + "load" in layers:
                    self._board.write_load(step, layers[LAYERS + "load"])
                self._board.write(
                    step, {name: float(value) for name, value in record.items() if name != "step"}
                )
        except OSError as error:
            raise TrainingFailed(f"the metrics of step {step} could not be written: {error}") from error


class Bystander:
    """Takes the monitor's place in every process but the first: it reports nothing."""

    def __enter__(self) -> Bystander:
        """Nothing to open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def train(self, step: int, metrics: Mapping[str, float], layers: Mapping[str, Any] | None = None) -> None:
        """Process 0 reports it."""

    def evaluation(self, step: int, loss: float, experts: Mapping[str, Any] | None = None) -> None:
        """Process 0 reports it."""

    def evaluating(self, done: int, total: int) -> None:
        """Process 0 shows it."""

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is timed here."""
        yield


class _LogFile(logging.FileHandler):
    """The log file; a line that a full disk does not take is dropped without a traceback on the terminal."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing: the metrics of the next step report the disk."""


class _TerminalHandler(logging.Handler):
    """Shows log records above the progress bar; a warning says that it is one."""

    def __init__(self, terminal: Terminal):
        super().__init__()
        self._terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        label = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        with contextlib.suppress(OSError):
            self._terminal.message(label + record.getMessage())
