"""`auto` in the config: what is measured, what is chosen by it and when, and that the numbers stay the same."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moejax
from moejax.cost import Link, Rates
from tests import tolerance
from tests.train import launching, small
from train.config import OptimizerConfig
from train.model import ModelSpec
from train.tuner import MOST_SHADOWS, Tuner

# Slow products: what is copied is spread over all devices, for which the wire does not cost too much.
RATES = Rates(Link(bandwidth=1e6, latency=0.0, memory_bandwidth=1e12), flops=1e6)
OPTIONS = ("--mesh.expert", 4, "--eval.every", 4, "--model.num_layers", 1)
AUTO = ("--model.moe.exchange", "auto", "--model.moe.shadow", "auto")


def losses(workdir):
    return [[line["loss"], line["aux_loss"]] for line in small.read_metrics(workdir) if "loss" in line]


def test_what_is_chosen_from_given_loads_and_rates(monkeypatch, caplog):
    monkeypatch.setattr("train.tuner.measure_rates", lambda mesh, axis, dtype: RATES)
    run = small.config(optimizer=OptimizerConfig(accumulation_steps=2))
    moe = dataclasses.replace(run.model.moe, shadow="auto", num_experts=16)
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, moe=moe))
    mesh = moejax.make_mesh(data=2, expert=4)
    tuner = Tuner(run, mesh)
    spec = ModelSpec.from_config(run, small.VOCAB, tuner.tuning)
    params = jax.jit(spec.init_params)(jax.random.key(0))
    demand_RE = params["blocks"][0]["ffn"]["demand_E"]
    assert demand_RE.shape == (2, 16) and not np.any(demand_RE)

    def choose(step, *loads):
        params["blocks"][0]["ffn"]["demand_E"] = jnp.asarray(loads, jnp.float32)
        changes = tuner.choose_shadows(step, spec, params)
        return changes, tuner.tuning.shadow

    even, hot = [10.0] * 16, [10.0] * 13 + [400.0] * 3
    with caplog.at_level(logging.INFO, "moejax"):
        assert choose(0, hot, hot) == (False, 0), "before the first step nothing is known"
        assert choose(100, even, even) == (False, 0)
        assert choose(100, even, hot) == (True, 3)
        assert choose(200, even, hot) == (False, 3)
        assert choose(201, even, [10.0] * 13 + [15.0] + [4000.0] * 2) == (False, 3), (
            "2 would save very little"
        )
        skewed = [load for load in (30.0, 120.0, 900.0, 3000.0) for _ in range(4)]
        assert choose(300, even, skewed) == (True, MOST_SHADOWS), "more would pay"
        assert choose(400, even, even) == (True, 0)
        assert choose(1, *[[0.1 * load for load in even]] * 2) == (False, 0)  # a mean that began with 0
    # By hand, of a step's two passes in each of two data groups: 10 / 4 rows for each of 4 experts of a device, in 2
    # layers; a row is 16 numbers on the wire, and 2 * 3 * 16 * 8 operations in an expert.
    rows, passes = 2 * 4 * 10 / 4, 2
    seconds = passes * rows * (4 * 16 * 4 / RATES.link.bandwidth + 3 * 6 * 16 * 8 / RATES.flops)
    for step in (1, 100, 400):
        estimate = re.findall(rf"after step {step}: [^;]*; [^;]*number: 0: (\S+),", caplog.text)[0]
        assert float(estimate) == pytest.approx(1e3 * seconds, rel=1e-2)


@pytest.mark.slow
def test_shadows_begin_at_an_evaluation_and_change_nothing_but_rounding(run, monkeypatch):
    asked = []
    monkeypatch.setattr("train.tuner.measure_rates", lambda mesh, axis, dtype: asked.append(axis) or RATES)
    assert run(*OPTIONS) == 0 and asked == [], "nothing is measured where nothing is left to it"
    expected = losses(run.workdir)

    run.workdir = run.workdir.with_name("auto")
    assert run(*OPTIONS, *AUTO, "--steps", 6) == 0 and run(*OPTIONS, *AUTO) == 0
    assert asked == ["expert", "expert"]
    np.testing.assert_allclose(losses(run.workdir), expected, rtol=tolerance.F32_MODEL)
    log = (run.workdir / "log.txt").read_text()
    assert "measured along expert: 0.00 GB/s out of a device, 0 us per message" in log
    assert "exchange along expert: all_gather, estimated for one chunk forward: all_to_all " in log
    changes = re.findall(r"shadows after step (\d+): (?:(\d) -> |still )(\d)", log)
    steps = [int(step) for step, *_ in changes]
    assert steps == [4, 6, 8], "at an evaluation that is not the last, and where the run goes on"
    assert all(before == "0" and after > "0" for _, before, after in changes[:2]), changes


@pytest.mark.slow
def test_processes_measure_together_and_choose_alike(tmp_path):
    config = launching.write_config(tmp_path)
    launching.run(*launching.launched(2, 2, config, tmp_path / "run", *OPTIONS, *AUTO))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert re.search(r"measured along expert: \d+\.\d\d GB/s .* products at 0\.\d\d TFLOP/s", log)
    assert "exchange along expert: all_" in log and "shadows after step 8: " in log
    assert len(losses(tmp_path / "run")) == 12
