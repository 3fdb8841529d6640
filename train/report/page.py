"""The report's HTML: one file, with its pictures in it, that needs nothing else."""

from __future__ import annotations

import base64
import contextlib
import html
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from train.errors import ConfigError
from train.fields import flatten, shown
from train.report import figures
from train.report.runs import Run, read_run
from train.report.specialisation import Specialisation, try_specialisation

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 74em; padding: 0 1em; color: #222; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1em 0; font-size: 0.9em; }
th, td { border: 1px solid #ddd; padding: 0.25em 0.6em; text-align: left; vertical-align: top; }
th { background: #f5f5f5; } td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.pictures { display: flex; flex-wrap: wrap; gap: 0.8em; }
.pictures img { width: calc(50% - 0.5em); object-fit: contain; align-self: flex-start; }
.pictures img.wide { width: 100%; }
code { background: #eef1f5; border-radius: 3px; padding: 0 0.3em; margin-right: 0.2em; white-space: pre; }
p.note { color: #666; font-size: 0.9em; }
"""


def write_report(directories: Sequence[str | os.PathLike[str]], output: str | None = None) -> Path:
    """Write the report of one run, or of several side by side.

    Args:
      directories: of the runs.
      output: folder; None: `report` in the first run's.

    Returns:
      The HTML file: `report.html`, or `comparison.html` of several runs. Its pictures lie beside it as PNG files.

    Raises:
      ConfigError: a run without metrics, or a folder that cannot be written.
    """
    runs = _with_different_names([read_run(directory) for directory in directories])
    folder = Path(output) if output else runs[0].directory / "report"
    album = Album(folder)
    names = ", ".join(run.name for run in runs)
    with _writing(folder):
        body = [f"<h1>{html.escape(names)}</h1>", _summary(runs), _differences(runs)]
        drawn, always_zero = figures.curves(runs)
        body += ["<h2>Training</h2>", album.show({"loss": figures.loss_curves(runs), **drawn})]
        if always_zero:
            body.append(f'<p class="note">Zero at every step: {html.escape(", ".join(always_zero))}.</p>')
        for run in runs:
            body += _experts(run, album)
        text = _document(names, body)
        path = folder / ("report.html" if len(runs) == 1 else "comparison.html")
        path.write_text(text, encoding="utf-8")
    return path


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ConfigError("--output", folder, f"cannot be written: {error.strerror}") from error


class Album:
    """Writes pictures as PNG files and gives the HTML that has them in itself."""

    def __init__(self, folder: Path):
        self._folder = folder

    def show(self, pictures: dict[str, Figure | None]) -> str:
        """The HTML of some pictures by file name; those that are None are left out."""
        images = []
        for name, figure in pictures.items():
            if figure is None:
                continue
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110)
            (self._folder / f"{name}.png").write_bytes(buffer.getvalue())
            data = base64.b64encode(buffer.getvalue()).decode("ascii")
            kind = ' class="wide"' if figure.get_figwidth() > figures.WIDTH else ""
            images.append(f'<img{kind} alt="{html.escape(name)}" src="data:image/png;base64,{data}">')
        return f'<div class="pictures">{"".join(images)}</div>' if images else ""


def _with_different_names(runs: list[Run]) -> list[Run]:
    """Runs whose directories have the same name are told apart by a number."""
    names = [run.name for run in runs]
    return [
        Run(
            f"{run.name} ({number + 1})" if names.count(run.name) > 1 else run.name,
            run.directory,
            run.config,
            run.steps,
            run.evaluations,
        )
        for number, run in enumerate(runs)
    ]


def _summary(runs: Sequence[Run]) -> str:
    head = (
        "run", "router", "steps", "last loss", "last eval/loss", "best eval/loss", "tokens/s (median)",
        "MaxVio (last tenth)", "MaxVio (evaluation)", "dropped", "dead experts", "most rounds",
    )  # fmt: skip
    rows = []
    for run in runs:
        _, losses = run.losses()
        value = lambda field, of, run=run: of(v) if len(v := run.series(field)[1]) else None  # noqa: E731
        last_tenth = lambda v: float(np.mean(v[-max(1, len(v) // 10) :]))  # noqa: E731
        rows.append(
            [
                run.name,
                run.config.model.moe.router,
                Number(f"{run.steps[-1]['step']} of {run.config.steps}"),
                _number(run.steps[-1]["loss"]),
                _number(losses[-1] if len(losses) else None),
                _number(min(losses) if len(losses) else None),
                _number(value("tokens_per_second", np.median), ",.0f"),
                _number(value("moe/max_vio", last_tenth), ".2f"),
                _number(run.evaluations[-1].get("eval/moe/max_vio") if run.evaluations else None, ".2f"),
                _number(value("moe/dropped_fraction", np.mean), ".2%"),
                _number(value("moe/dead_experts", lambda v: v[-1]), ".0f"),
                _number(value("moe/rounds", np.max), ".0f"),
            ]
        )
    return _table(head, rows)


def _differences(runs: Sequence[Run]) -> str:
    """The config fields in which the runs differ."""
    if len(runs) == 1:
        return ""
    configs = [flatten(run.config) for run in runs]
    differing = [
        name for name in configs[0] if name != "workdir" and len({str(c[name]) for c in configs}) > 1
    ]
    rows = [[name, *(shown(config[name]) for config in configs)] for name in differing]
    return "<h2>Differences</h2>" + _table(["field", *(run.name for run in runs)], rows) if rows else ""


def _experts(run: Run, album: Album) -> list[str]:
    found, reason = try_specialisation(run)
    prefix = "".join(c if c.isalnum() else "-" for c in run.name)
    pictures = {
        f"{prefix}-load": figures.load_over_time(run),
        f"{prefix}-entropy": figures.by_layer(run, "router_entropy", "Router entropy by layer", "nats"),
        f"{prefix}-max-vio": figures.by_layer(
            run, "max_vio", "MaxVio by layer", "largest load over mean load, minus 1"
        ),
        f"{prefix}-logits": figures.by_layer(run, "logit_norm", "Router logits by layer", "root mean square"),
        f"{prefix}-pairs": figures.coactivation(found.pairs) if found else None,
    }
    body = [f"<h2>Experts of {html.escape(run.name)}</h2>", album.show(pictures)]
    if found is None:
        return [*body, f'<p class="note">No table of the experts\' tokens: {html.escape(reason)}</p>']
    note = (
        f"From {found.tokens:,} tokens of the validation text, with the checkpoint of step {found.step}. The number "
        "beside a token is the share of its places in the text at which it goes to the expert. Only tokens that are "
        "more frequent here than in all text are shown. Share: of all choices."
    )
    return [*body, "<h3>Which tokens each expert prefers</h3>", f'<p class="note">{note}</p>', _tokens(found)]


def _tokens(found: Specialisation) -> str:
    rows = []
    for layer, experts in enumerate(found.preferences):
        for expert, liked in enumerate(experts):
            tokens = [f"<code>{html.escape(visible(one.text))}</code>{one.share:.0%}" for one in liked]
            load = _number(found.loads[layer][expert], ".1%")
            rows.append([str(layer), str(expert), load, Html(" ".join(tokens) or "–")])
    return _table(["MoE layer", "expert", "share", "tokens"], rows)


def visible(text: str) -> str:
    """A token with its blanks and control characters shown."""
    shown_text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown_text) or "∅"


class Html(str):
    """A table's cell that is HTML already."""


class Number(str):
    """A table's cell that is set flush right."""


def _number(value: float | None, form: str = ".4f") -> Number:
    return Number("–" if value is None else format(float(value), form))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    def cell(text: str) -> str:
        kind = ' class="number"' if isinstance(text, Number) else ""
        return f"<td{kind}>{text if isinstance(text, Html) else html.escape(text)}</td>"

    lines = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr>{lines}</table>"


def _document(title: str, body: Iterable[str]) -> str:
    written = f'<p class="note">Written {datetime.now():%Y-%m-%d %H:%M} by moejax report.</p>'
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n" + "\n".join([*body, written]) + "\n</body>\n</html>\n"
    )
