"""What evaluations say of the experts: exact on every layout, and the same after a resume."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.train import small
from train import cli
from train.evaluate import OBSERVED, evaluate
from train.observe import NEVER, ExpertView, best_pairs, changed_share, coactivation
from train.step import make_eval_step

pytestmark = pytest.mark.landing


def naive_sums(model, batch):
    """Loads, pairs and first choices by a loop over what the routers decide, token by token."""
    arrays = {f"{name}_BS": batch[name] for name in ("tokens", "segments", "positions")}
    tokens = arrays.pop("tokens_BS")
    load, together, first = [], [], []
    for routing in model.routings(tokens, **arrays):
        ids = np.asarray(routing.ids_TK)
        load.append([np.sum(ids == e) for e in range(8)])
        together.append(np.zeros((8, 8)))
        for row in ids:
            for i in set(row) - {-1}:
                for j in set(row) - {-1}:
                    together[-1][i, j] += 1
        first.append(ids[:, 0])
    return np.array(load), np.array(together), np.array(first)


@pytest.mark.parametrize("layout", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 4)], ids=str)
def test_sums_are_those_of_the_routers_decisions(layout):
    run = small.config()
    trainer, batch = small.Steps(run, *layout), small.random_batch(run, 1)
    with jax.set_mesh(trainer.mesh):
        sums = jax.jit(make_eval_step(trainer.spec, trainer.mesh))(trainer.state.params, trainer.put(batch))
    sums = jax.device_get(sums)
    alone = jax.device_get(trainer.state.params)
    load, together, first = naive_sums(trainer.spec.merge(alone), batch)
    np.testing.assert_array_equal(sums["load"], load)
    np.testing.assert_array_equal(sums["together"], together)
    np.testing.assert_array_equal(sums["first"], first)
    assert sums["routed"] == np.sum(batch["segments"] > 0) and (first == -1).any(), "padding chooses nothing"


def batches_of(count):
    """What an evaluation step could have said of so many batches: 2 layers of 3 experts, 4 watched tokens."""
    random = np.random.default_rng(0)
    return [
        {
            "loss": np.float32(8),
            "tokens": np.int32(4),
            "load": random.integers(0, 9, (2, 3), dtype=np.int32),
            "dropped": np.array([number, 0], np.int32),
            "routed": np.float32(4),
            "together": random.integers(0, 9, (2, 3, 3)).astype(np.float32),
            "first": np.full((2, 4), number, np.int32),
        }
        for number in range(count)
    ]


def test_an_evaluation_adds_up_its_batches_but_watches_the_first_one(monkeypatch):
    monkeypatch.setattr("train.evaluate.device_batch", lambda batch, mesh: batch)
    batches = batches_of(OBSERVED + 3)
    found = evaluate(lambda _, batch: dict(batch), None, batches, None, experts_of_layers=(3, 3))
    assert found.loss() == 2 and found.tokens() == 4 * (OBSERVED + 3)
    np.testing.assert_array_equal(found.experts.load_ME, np.sum([b["load"] for b in batches], axis=0))
    pairs = np.sum([b["together"] for b in batches[:OBSERVED]], axis=0)
    np.testing.assert_array_equal(found.experts.together_MEE, pairs)
    assert found.experts.together_tokens == 4 * OBSERVED and not found.experts.first_MW.any()
    assert found.experts.dropped_M.tolist() == [sum(range(OBSERVED + 3)), 0]


def test_shares_of_what_changed_count_no_padding():
    before = np.array([[0, 1, 2, -1], [3, 3, -1, -1]])
    now = np.array([[0, 2, 2, -1], [1, -1, 3, -1]])
    np.testing.assert_allclose(changed_share(before, now), [1 / 3, 1])


def test_pairs_are_told_from_independent_choices():
    # Of 200 tokens, 100 chose expert 0 and 60 expert 1: 30 of both would be chance.
    together = np.array([[100, 60, 20], [60, 60, 10], [20, 10, 40]])
    np.testing.assert_allclose(coactivation(together, 200), [[0, 2, 1], [2, 0, 10 / 12], [1, 10 / 12, 0]])
    assert best_pairs(together, 200) == [[0, 1, 2.0]]
    assert best_pairs(together // 10, 20) == [], "too few to say"


def test_numbers_of_an_evaluation():
    # Of the five that were not carried out, the router has dropped three; the load counts the other two.
    load, dropped, by_router = np.array([[6, 2, 4], [4, 4, 4]]), np.array([3, 2]), np.array([3, 0])
    first = np.array([[0, 1], [2, 2]])
    view = ExpertView(load, dropped, by_router, first, np.zeros((2, 3, 3)), 0, (3, 3))
    never = view.metrics(np.full((2, 2), NEVER))
    assert never["moe/max_vio"] == 0.5 and never["moe/dropped_fraction"] == 5 / 27
    assert "moe/changed" not in never, "there is nothing to compare with"
    again = view.metrics(np.array([[0, 0], [2, 2]]))
    assert again["moe/changed"] == 0.25 and again["moe/layers/changed"].tolist() == [0.5, 0]


@pytest.mark.slow
def test_what_changed_is_the_same_after_a_resume(tmp_path):
    run = small.config(steps=6)
    text = str(small.write_text(tmp_path / "text"))
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, path=text),
        optimizer=dataclasses.replace(run.optimizer, warmup_steps=1, learning_rate=0.02, schedule="constant"),
        eval=dataclasses.replace(run.eval, every=2, max_batches=2),
        checkpoint=dataclasses.replace(run.checkpoint, every=3),
    )
    config = small.write_config(tmp_path / "small.py", run)

    def train(name, *options):
        arguments = ["train", str(config), "--workdir", str(tmp_path / name), *options]
        assert cli.main(arguments) == 0
        return small.read_metrics(tmp_path / name)

    whole = train("whole")
    train("parts", "--steps", "3")
    # The first part also evaluates after step 3, its last: at step 4 the two have something else to compare with.
    parts = train("parts")
    evaluations = [
        [line for line in lines if "eval/loss" in line and line["step"] > 3] for lines in (whole, parts)
    ]
    assert [line["step"] for line in evaluations[0]] == [4, 6]
    assert all(line["eval/moe/changed"] > 0 for line in evaluations[0])
    assert [line["eval/moe/layers/load"] for line in evaluations[0]] == [
        line["eval/moe/layers/load"] for line in evaluations[1]
    ]
    assert json.dumps(evaluations[0][1]) == json.dumps(evaluations[1][1]), (
        "the evaluation before was at step 4"
    )
