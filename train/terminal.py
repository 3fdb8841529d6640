"""What a person sees while a run trains: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Protocol, TextIO

from train.clock import now
from train.metrics import DROP_CAUSES

_ONLY_IF_ANY = ("moe/dropped_fraction", "moe/dead_experts")
_PLAIN_SECONDS = 5.0  # between plain lines: a log file should stay readable


class Terminal(Protocol):
    """Where progress is shown."""

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a logged step."""

    def evaluating(self, done: int, total: int) -> None:
        """Show how many batches of an evaluation are done."""

    def evaluation(self, step: int, loss: float) -> None:
        """Show an evaluation loss."""

    def message(self, text: str) -> None:
        """Show a line that stays."""

    def close(self) -> None:
        """Leave the screen in order."""


def make_terminal(stream: TextIO, total_steps: int, start_step: int) -> Terminal:
    """A live view when `stream` is a terminal that can move its cursor, else plain lines."""
    if stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb"):
        return LiveTerminal(stream, total_steps, start_step)
    return PlainTerminal(stream, total_steps)


class Pace:
    """Time left, from the pace since the first logged step: that one has the compilation in it."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = now):
        self._total, self._clock = total_steps, clock
        self._first: tuple[int, float] | None = None

    def remaining(self, step: int) -> str:
        """Time left after `step` as `1:02:03`, or `-:--` while unknown."""
        if self._first is None:
            self._first = step, self._clock()
        first_step, started = self._first
        if step == first_step:
            return "-:--"
        return duration((self._total - step) * (self._clock() - started) / (step - first_step))


def duration(seconds: float) -> str:
    """Seconds as `0:07`, `12:34` or `1:02:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def summary(metrics: Mapping[str, float]) -> str:
    """The few numbers worth watching, of those present."""
    parts = [
        f"{label} {metrics[name]:{form}}" + (_cause_of_drops(metrics) if label == "dropped" else "")
        for name, label, form in (
            ("loss", "loss", ".4f"),
            ("moe/max_vio", "balance", ".2f"),
            ("moe/load_entropy", "spread", ".0%"),
            ("moe/dropped_fraction", "dropped", ".1%"),
            ("moe/dead_experts", "dead", "d"),
            ("tokens_per_second", "tokens/s", ",.0f"),
        )
        if name in metrics and not (name in _ONLY_IF_ANY and not metrics[name])
    ]
    return "  ".join(parts)


def _cause_of_drops(metrics: Mapping[str, float]) -> str:
    """Where most of what is dropped is dropped, in a word."""
    shares = {cause: metrics.get(f"moe/{cause}", 0.0) for cause in DROP_CAUSES}
    worst = max(shares, key=lambda cause: shares[cause])
    return f" ({worst.split('_')[-1]})" if shares[worst] else ""


class PlainTerminal:
    """Lines without control codes: the first and last step, evaluations, and a step every few seconds."""

    def __init__(self, stream: TextIO, total_steps: int, clock: Callable[[], float] = now):
        self._stream, self._total, self._clock = stream, total_steps, clock
        self._pace = Pace(total_steps, clock)
        self._shown: float | None = None

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print a logged step, unless the last line is only a moment old."""
        remaining, moment = self._pace.remaining(step), self._clock()
        if self._shown is None or step >= self._total or moment - self._shown >= _PLAIN_SECONDS:
            self._shown = moment
            self.message(f"step {step}/{self._total}  {summary(metrics)}  ETA {remaining}")

    def evaluating(self, done: int, total: int) -> None:
        """Print how far an evaluation is, unless the last line is only a moment old."""
        moment = self._clock()
        if self._shown is None or moment - self._shown >= _PLAIN_SECONDS:
            self._shown = moment
            self.message(f"evaluating  {done}/{total} batches")

    def evaluation(self, step: int, loss: float) -> None:
        """Print an evaluation loss."""
        self.message(f"step {step}/{self._total}  eval/loss {loss:.4f}")

    def message(self, text: str) -> None:
        """Print a line."""
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to put in order."""


class LiveTerminal:
    """A progress bar that stays at the bottom; messages scroll above it."""

    def __init__(self, stream: TextIO, total_steps: int, start_step: int):
        # Only here, so that a run in a batch queue does not load it.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        self._pace = Pace(total_steps)
        self._evaluation = ""
        self._progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),  # the bar gives way on a narrow screen
            TextColumn("{task.fields[numbers]}"),
            TextColumn("{task.fields[evaluation]}"),
            TextColumn("ETA {task.fields[remaining]}"),
            console=Console(file=stream),
            auto_refresh=False,  # a thread that draws would take time from training
            redirect_stdout=False,
            redirect_stderr=False,
        )
        is_done = start_step >= total_steps
        self._task = self._progress.add_task(
            "",
            total=total_steps,
            completed=start_step,
            numbers="finished" if is_done else "compiling",
            evaluation="",
            remaining=duration(0) if is_done else "-:--",
        )
        self._progress.start()
        self._progress.refresh()

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar and renew its numbers."""
        remaining = self._pace.remaining(step)
        self._progress.update(
            self._task, completed=step, numbers=summary(metrics), remaining=remaining, refresh=True
        )

    def evaluating(self, done: int, total: int) -> None:
        """Say how far an evaluation is, in the place of its loss."""
        self._progress.update(self._task, evaluation=f"evaluating {done}/{total}", refresh=True)

    def evaluation(self, step: int, loss: float) -> None:
        """Renew the evaluation loss beside the bar."""
        self._progress.update(self._task, evaluation=f"eval {loss:.4f}", refresh=True)

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it is and give the cursor back."""
        self._progress.stop()
