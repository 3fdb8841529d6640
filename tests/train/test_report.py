"""The report: one page that needs nothing else, from a run's files; what each expert is there for."""

import base64
import dataclasses
import html.parser
import io

import numpy as np
import pytest
from matplotlib import image

from tests.train import small
from train import cli
from train.config import MoEConfig
from train.config_io import save_config
from train.errors import ConfigError
from train.metrics import Metrics
from train.report import write_report
from train.report.page import visible
from train.report.runs import read_run
from train.report.specialisation import count_choices, pairs, preferences


class Page(html.parser.HTMLParser):
    """What stands in a page: tags that load something, pictures, and the cells of its tables."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.pictures, self.cells, self.open = [], {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.sources += [attrs[name] for name in ("src", "href") if name in attrs]
        if tag == "img":
            self.pictures[attrs["alt"]] = base64.b64decode(attrs["src"].partition("base64,")[2])
        if tag in ("td", "th"):
            self.cells.append("")
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.cells[-1] += data


def write_run(directory, router="topk", steps=6):
    """A run's files as training writes them, without having trained."""
    directory.mkdir()
    run = small.config()
    moe = MoEConfig(num_experts=4, d_hidden=8, router=router)
    run = dataclasses.replace(run, steps=steps, model=dataclasses.replace(run.model, moe=moe))
    save_config(run, directory / "config.yaml")
    metrics, random = Metrics(directory / "metrics.jsonl"), np.random.default_rng(0)
    for step in range(1, steps + 1):
        layers = {
            "load": random.integers(0, 9, (2, 4)),
            "max_vio": random.random(2),
            "router_entropy": random.random(2),
        }
        scalars = {
            "loss": 3 / step,
            "tokens_per_second": 100.0,
            "moe/max_vio": 0.25,
            "moe/dropped_fraction": 0.1,
            "moe/dead_experts": 0,
        }
        detail = {f"moe/layers/{name}": value for name, value in layers.items()} if step % 2 else {}
        metrics.append({"step": step, **scalars, **detail})
        if step % 3 == 0:
            metrics.append({"step": step, "eval/loss": 4 / step, "eval/moe/max_vio": 0.1 * step})
    metrics.close()
    return directory


def test_one_page_has_everything_in_it(tmp_path):
    run = write_run(tmp_path / "<td>run & co")
    path = write_report([run])
    assert path == run / "report" / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    assert page.sources and all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "Zero at every step: Dead experts." in path.read_text(encoding="utf-8")
    names = {
        "loss",
        "tokens_per_second",
        "moe_max_vio",
        "eval_moe_max_vio",
        "moe_dropped_fraction",
        "-td-run---co-load",
    }
    assert names <= set(page.pictures)
    for name, picture in page.pictures.items():
        assert (run / "report" / f"{name}.png").read_bytes() == picture
        pixels = image.imread(io.BytesIO(picture))
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.02, f"{name} is not empty"
    first_row = page.cells[page.cells.index("<td>run & co") :]
    assert first_row[:6] == ["<td>run & co", "topk", "6 of 6", "0.5000", "0.6667", "0.6667"]
    assert "No table of the experts" in path.read_text(encoding="utf-8"), "there is no checkpoint"


def test_runs_side_by_side(tmp_path):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", router="switch", steps=3)]
    page = Page(write_report(runs, str(tmp_path / "out")).read_text(encoding="utf-8"))
    assert (tmp_path / "out" / "comparison.html").is_file()
    for field, *values in (("model.moe.router", "topk", "switch"), ("steps", "6", "3")):
        row = page.cells.index(field, page.cells.index("field"))
        assert page.cells[row : row + 3] == [field, *values]
    assert {"a-load", "b-load"} <= set(page.pictures)


def test_load_is_a_multiple_of_the_even_share(tmp_path):
    steps, load = read_run(write_run(tmp_path / "run")).load()
    assert steps.tolist() == [1, 3, 5] and [layer.shape for layer in load] == [(3, 4)] * 2
    np.testing.assert_allclose(np.mean(load, axis=2), 1)


def test_bad_runs_are_named(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2
    assert "error: RUN = " in capsys.readouterr().err
    assert cli.main(["report"]) == 2
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has logged no step yet"):
        read_run(run)


def test_a_run_that_is_being_written_has_its_whole_lines(tmp_path):
    write_run(tmp_path / "run", steps=2)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in [*range(first, len(whole), 37), len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:end])
        run = read_run(tmp_path / "run")
        assert len(run.steps) + len(run.evaluations) == whole[:end].count(b"\n")
    path.write_bytes(b"\r\n" + whole + b"\0" * 8)  # as after a power cut
    assert len(read_run(tmp_path / "run").steps) == 2
    assert cli.main(["report", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"step": 3, "tok', "line 2: is not a record of metrics: Invalid control character"),
        ("\0\0", "line 2: is not a record of metrics: "),
        ("[1]", "line 2: is not a record of metrics: it must be an object with a whole number as step"),
        ('{"step": "2", "loss": 1}', "line 2: is not a record of metrics: it must be an object"),
        (
            '{"step": 2, "loss": null}',
            "line 2: is not a record of metrics: a value is NoneType, not a number",
        ),
        ('{"step": 2, "loss": "low"}', "line 2: is not a record of metrics: could not convert"),
        (
            '{"step": 1000000000000000000000000000000, "loss": 1}',
            "line 2: is not a record of metrics: it must be",
        ),
        (
            '{"step": 2, "loss": 1e308}',
            "line 2: is not a record of metrics: 1e+308 is beyond what a training",
        ),
        ('{"step": 2, "loss": [1, 2]}', "is not a record of metrics: loss at step 2 must be a number"),
        (
            '{"step": 2, "moe/layers/load": [[1, 2], [1]]}',
            "is not a record of metrics: moe/layers/load at step 2 must be a list of lists per layer, as on the lines",
        ),
        (
            '{"step": 2, "moe/layers/max_vio": [[1], 2]}',
            "is not a record of metrics: moe/layers/max_vio at step 2 must be a list of numbers per layer, as on",
        ),
    ],
)
def test_a_line_that_no_training_writes_is_named(tmp_path, capsys, line, rule):
    write_run(tmp_path / "run", steps=1)
    path = tmp_path / "run" / "metrics.jsonl"
    first = path.read_text().splitlines()[0]
    path.write_text(f"{first}\n{line}\n{first}\n")
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: RUN = ") and rule in error


def test_a_fault_of_ours_is_not_called_bad_input(tmp_path, monkeypatch):
    def fail(runs):
        raise TypeError("ours")

    monkeypatch.setattr("train.report.page.figures.loss_curves", fail)
    with pytest.raises(TypeError, match="ours"):
        write_report([write_run(tmp_path / "run")])


def test_counts_preferences_and_pairs():
    tokens = np.array([0] * 10 + [1] * 10 + [2] * 3)
    ids = np.array([[0, 1]] * 10 + [[1, 2]] * 9 + [[0, -1]] + [[2, 0]] * 3)
    counts = count_choices(tokens, ids, 4, 3)
    assert counts.tolist() == [[10, 10, 0], [1, 9, 9], [3, 0, 3], [0, 0, 0]]
    liked = preferences(counts, np.bincount(tokens, minlength=4), ["a", "b", "rare", "never"])
    assert [[(one.text, one.share) for one in expert] for expert in liked] == [
        [("a", 1)],
        [("a", 1), ("b", 0.9)],
        [("b", 0.9)],
    ]
    together = pairs(ids, 3)
    assert together[0, 1] == pytest.approx(10 / (14 * 19 / 23)) and not np.diag(together).any()
    np.testing.assert_array_equal(together, together.T)


def test_blanks_and_control_characters_are_shown():
    assert [visible(text) for text in (" a", "\n", "\t", "\x00", "", "é")] == [
        "␣a",
        "↵",
        "⇥",
        "\\x00",
        "∅",
        "é",
    ]


@pytest.mark.slow
def test_report_of_a_trained_run(tmp_path, capsys):
    run = small.config(steps=4)
    moe = dataclasses.replace(run.model.moe, layer_experts="0:4", layer_routers="1:switch")
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, path=str(small.write_text(tmp_path / "text"))),
        model=dataclasses.replace(run.model, moe=moe),
        log=dataclasses.replace(run.log, tensorboard=True),
    )
    config = small.write_config(tmp_path / "small.py", run)
    assert cli.main(["train", str(config), "--workdir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "report" / "report.html"
    assert capsys.readouterr().out.strip() == str(path)
    page = Page(path.read_text(encoding="utf-8"))
    assert "run-pairs" in page.pictures and "MoE layer" in page.cells
    table = page.cells[page.cells.index("MoE layer") + 4 :]
    assert len(table) == 4 * (4 + 8) and any("%" in cell for cell in table[3::4])
    shares = np.array([float(cell.rstrip("%")) for cell in table[2::4]])
    # Each share is printed to one digit behind the point.
    np.testing.assert_array_less(np.abs([shares[:4].sum() - 100, shares[4:].sum() - 100]), [0.21, 0.41])
    lines = small.read_metrics(tmp_path / "run")
    for name in ("moe/layers/load", "moe/layers/dead", "eval/moe/layers/load"):
        rows = [line[name] for line in lines if name in line]
        assert rows and all([len(row_E) for row_E in row] == [4, 8] for row in rows), name
