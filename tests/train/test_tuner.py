"""`auto` in the config: what is measured, what is chosen by it and when, and that the numbers stay the same."""

import re

import numpy as np
import pytest

from moejax.cost import Link, Rates
from tests import tolerance
from tests.train import small

# A wire on which a row costs more than the whole rest.
SLOW_WIRE = Rates(Link(1e5, 0.0, 1e12), 1e15)


@pytest.fixture
def rates(monkeypatch):
    """Rates by axis in place of measured ones, and the axes that were asked for."""
    asked = []

    def measure(mesh, axis, dtype):
        asked.append(axis)
        return SLOW_WIRE

    monkeypatch.setattr("train.tuner.measure_rates", measure)
    return asked


def losses(workdir):
    return [[line["loss"], line["aux_loss"]] for line in small.read_metrics(workdir) if "loss" in line]


def test_shadows_begin_at_an_evaluation_by_the_load_so_far_and_change_nothing_but_rounding(run, rates):
    # A wire so slow that every row saved pays, and a router that sends most tokens to few experts.
    options = ("--mesh.expert", 4, "--eval.every", 4)
    assert run(*options) == 0 and rates == []
    expected = losses(run.workdir)
    run.workdir = run.workdir.with_name("auto")
    assert run(*options, "--model.moe.shadow", "auto") == 0 and rates == ["expert"]
    print((run.workdir/"log.txt").read_text())
    np.testing.assert_allclose(losses(run.workdir), expected, rtol=tolerance.F32_MODEL)
