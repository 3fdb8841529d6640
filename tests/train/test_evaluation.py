"""Evaluation and generation by whole runs, and what the best evaluation is kept for."""

import shutil

import jax
import numpy as np
import pytest

import moejax
from tests import tolerance
from tests.train import small
from train import cli
from train.config_io import load_config
from train.data import load_corpus, load_tokenizer
from train.evaluate import IN_FLIGHT, Evaluation, evaluate, evaluate_run, restore_params
from train.generate import generate_run, sample
from train.model import ModelSpec
from train.reporter import QUEUED


@pytest.mark.landing
def test_evaluation_counts_every_token_of_the_split_once(run, capsys):
    assert run("--steps", 2) == 0
    loss, tokens = evaluate_run(str(run.workdir))
    config, tokenizer = load_config(run.workdir / "config.yaml"), load_tokenizer(run.workdir)
    assert tokens == load_corpus(config.data, tokenizer).validation.num_predictions
    assert loss == pytest.approx(small.read_metrics(run.workdir)[-1]["eval/loss"], rel=tolerance.F32)
    run.text.write_text(run.text.read_text().replace("quick", "brisk"))
    assert cli.main(["eval", str(run.workdir)]) == 2
    assert "error: data.path" in capsys.readouterr().err


def test_evaluation_holds_few_batches_at_once(monkeypatch):
    dispatched, fetched, most, waited_for = [], [], [], []
    monkeypatch.setattr("train.evaluate.device_batch", lambda batch, mesh: batch)
    monkeypatch.setattr(jax, "device_get", lambda sums: fetched.extend(sums) or sums)

    monkeypatch.setattr(jax, "block_until_ready", lambda sums: waited_for.append(sums["loss"]))

    def eval_step(params, batch):
        newest = batch - 1 - QUEUED  # what must be done before the next one is handed over
        assert newest < 0 or newest in waited_for or newest in [sums["loss"] for sums in fetched]
        dispatched.append(batch)
        most.append(len(dispatched) - len(fetched))
        return {"loss": float(batch), "tokens": 2}

    found = evaluate(eval_step, None, iter(range(2 * IN_FLIGHT + 3)), None, experts_of_layers=())
    assert max(most) == IN_FLIGHT
    assert found.tokens() == 70 and found.loss() == sum(range(35)) / 70
    assert found.tokens(2) == 4 and found.loss(2) == 1 / 4


@pytest.mark.landing
def test_the_best_evaluation_makes_a_checkpoint_of_its_own(run, monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.6, 2.7, 1.0])

    # The last evaluation is over the whole split and has the lowest loss there, but not over the first batch.
    def whole_is_lower(eval_step, params, batches, mesh, **rest):
        found, batches = next(losses), list(batches)
        if len(batches) > 1:
            return Evaluation(np.asarray([27.0, 0.0]), np.asarray([10, 90]))
        return Evaluation(np.asarray([10 * found]), np.asarray([10]))

    monkeypatch.setattr("train.evaluator.evaluate", whole_is_lower)
    options = (
        "--eval.every",
        2,
        "--eval.max_batches",
        1,
        "--checkpoint.every",
        5,
        "--checkpoint.keep_last",
        1,
    )
    assert run(*options) == 0
    assert sorted(int(path.name) for path in (run.workdir / "checkpoints").iterdir()) == [4, 12]
    assert small.read_metrics(run.workdir)[-1]["eval/loss"] == pytest.approx(0.27)


@pytest.mark.slow
def test_the_evaluation_of_what_becomes_the_last_step_is_made_whole(run):
    options = ("--eval.every", 2, "--eval.max_batches", 1)
    assert run("--steps", 4, *options) == 0
    part = small.read_metrics(run.workdir)[2]
    shutil.rmtree(run.workdir / "checkpoints" / "4")
    for _ in range(2):  # the second time nothing is left to do
        assert run("--steps", 2, *options) == 0
        lines = small.read_metrics(run.workdir)
        assert [line["step"] for line in lines] == [1, 2, 2]
        assert (run.workdir / "log.txt").read_text().count("evaluating on the whole") == 2
    whole, _ = evaluate_run(str(run.workdir))
    assert lines[-1]["eval/loss"] == pytest.approx(whole, rel=tolerance.F32)
    assert part["step"] == 2 and part["eval/loss"] != pytest.approx(whole, rel=1e-4)


@pytest.mark.landing
def test_generation_is_greedy_at_temperature_0_and_equals_the_whole_forward(run, monkeypatch):
    assert run("--steps", 12, "--optimizer.warmup_steps", 1, "--optimizer.learning_rate", 0.01) == 0
    config, tokenizer = load_config(run.workdir / "config.yaml"), load_tokenizer(run.workdir)
    text = "".join(generate_run(str(run.workdir), "the", max_tokens=8, temperature=0))
    spec = ModelSpec.from_config(config, tokenizer.vocab_size)
    model = spec.merge(restore_params(run.workdir, config, spec.abstract_params(None))[1])
    ids = [*tokenizer.encode("the")]
    with jax.set_mesh(jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("one",))):
        for _ in range(8):
            hidden, *_ = model(np.asarray([ids], np.int32))
            ids.append(int(model.logits(hidden)[0, -1].argmax()))
    assert text == "the" + tokenizer.decode(ids[3:])

    shapes = []
    call = moejax.Transformer.__call__

    def spy(self, tokens_BS, **options):
        shapes.append(tokens_BS.shape[1])
        return call(self, tokens_BS, **options)

    monkeypatch.setattr(moejax.Transformer, "__call__", spy)
    for prompt in ("t", "to be or no"):
        list(generate_run(str(run.workdir), prompt, max_tokens=1, temperature=0))
    assert shapes == [16, 16], "one length for short prompts, and nothing is computed after the last token"


def test_sampling_keeps_to_top_k_and_top_p():

    logits = jax.numpy.log(jax.numpy.asarray([0.05, 0.5, 0.3, 0.15]))
    draw = jax.jit(sample, static_argnames=("temperature", "top_k", "top_p"))

    def drawn(**options):
        options = {"temperature": 1.0, "top_k": None, "top_p": None} | options
        return {int(draw(logits, jax.random.key(seed), **options)) for seed in range(60)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {1, 2}
    assert drawn(top_p=0.7) == {1, 2} and drawn(top_p=0.01) == {1}
    assert drawn(temperature=0) == {1}
