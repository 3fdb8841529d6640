"""The optimizer step: the same on every layout, split into parts or not, and free of host traffic."""

import dataclasses
import logging
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import moejax
from moejax.cost import peak_flops
from tests import tolerance
from tests.collective_order import loops_with_collectives, side_by_side
from tests.moejax import oracle
from tests.train import small
from train.config import CheckpointConfig, LogConfig, MeshConfig, ModelConfig, MoEConfig, OptimizerConfig
from train.errors import TrainingFailed
from train.model import ModelSpec
from train.monitor import Bystander
from train.program import compiler_options
from train.reporter import Reporter
from train.step import make_loss

pytestmark = pytest.mark.landing


def losses(run, data, expert, steps, **axes):
    trainer = small.Steps(run, data, expert, **axes)
    reports = [trainer.take(small.random_batch(run, seed % 5)) for seed in range(steps)]
    return np.asarray([[float(r["loss"]), float(r["aux_loss"]), float(r["grad_norm"])] for r in reports])


@pytest.mark.parametrize("layout", [pytest.param((2, 1), marks=pytest.mark.slow), (2, 4)], ids=str)
def test_layouts_train_alike(layout):
    run = small.config(steps=50)
    expected = losses(run, 1, 1, 10)
    np.testing.assert_allclose(losses(run, *layout, 10), expected, rtol=tolerance.F32_MODEL)
    assert expected[-1, 0] < expected[0, 0] - 0.01, "it learns"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        dict(axes=dict(expert=8)),
        dict(axes=dict(expert=8), exchange="all_gather"),
        dict(axes=dict(expert=8), exchange="ragged"),
        dict(axes=dict(expert_node=2, expert=4), exchange="ragged"),
        dict(axes=dict(data=2, expert=4), layers=6, remat="full"),
        dict(axes=dict(data=2, expert=4), fsdp=True),
        dict(axes=dict(expert_node=2, expert=2, tensor=2), accumulation=2),
    ],
    ids=str,
)
def test_no_collective_runs_beside_a_loop_of_rounds(case):
    run = small.config(mesh=MeshConfig(fsdp=case.get("fsdp", False)))
    exchange = case.get("exchange", "all_to_all")
    moe = dataclasses.replace(run.model.moe, exchange=exchange, shadow=1, shared_experts=1, shared_gate=True)
    model = dataclasses.replace(
        run.model, num_layers=case.get("layers", 2), remat=case.get("remat", "none"), moe=moe
    )
    optimizer = dataclasses.replace(run.optimizer, accumulation_steps=case.get("accumulation", 1))
    steps = small.Steps(dataclasses.replace(run, model=model, optimizer=optimizer), **case["axes"])
    batch = steps.put(small.random_batch(run, 0))
    with jax.set_mesh(steps.mesh):
        training = steps.step.lower(steps.state, batch).compile().as_text()
        evaluation = steps.eval_step.lower(steps.state.params, batch).compile().as_text()
    assert loops_with_collectives(training) >= 2
    assert loops_with_collectives(evaluation) >= 1
    assert not side_by_side(training)
    assert not side_by_side(evaluation)


@pytest.mark.slow
def test_split_in_every_way_at_once_it_trains_alike():
    # Capacity so small that every step takes further rounds.
    run = small.config(steps=50)
    moe = dataclasses.replace(run.model.moe, capacity_factor=0.5)
    split = dataclasses.replace(
        run, mesh=MeshConfig(fsdp=True), model=dataclasses.replace(run.model, moe=moe)
    )
    expected = losses(run, 1, 1, 5)
    actual = losses(split, 2, 2, 5, tensor=2)
    np.testing.assert_allclose(actual, expected, rtol=tolerance.F32_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moe",
    [
        dict(exchange="all_gather"),
        dict(exchange="ragged", capacity_factor=0.6),
        dict(exchange="auto", chunks=2),
        dict(shadow=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("axes", [dict(expert_node=2), dict(tensor=2)], ids=str)
def test_every_exchange_trains_alike(moe, axes):
    run = small.config(steps=50)
    moe = dataclasses.replace(run.model.moe, **moe)
    other = dataclasses.replace(run, model=dataclasses.replace(run.model, moe=moe))
    np.testing.assert_allclose(losses(other, 1, 2, 5, **axes), losses(run, 1, 1, 5), rtol=tolerance.F32_MODEL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [(1, 2), (2, 1), (1, 4), (4, 1), (2, 2), (1, 8), (8, 1), (4, 2), (2, 4)], ids=str
)
def test_fifty_steps_agree_on_every_layout(layout):
    run = small.config(steps=50)
    actual, expected = losses(run, *layout, 50), losses(run, 1, 1, 50)
    np.testing.assert_allclose(actual[:, :2], expected[:, :2], rtol=tolerance.F32_MODEL)
    # Against the largest of the 50 norms, as the error of a tensor is defined here.
    tolerance.assert_close(actual[:, 2], expected[:, 2], tolerance.F32_MODEL, "gradient norm")


class DenseMoE(moejax.MoE):
    """The MoE layer computed by the dense oracle, on the same parameters."""

    def __call__(self, x, *, token_mask=None, **_):
        y, balance, z = oracle.moe(
            x.reshape(-1, x.shape[-1]),
            self.router.w_DE[...],
            self.experts.w_in[...],
            self.experts.w_out[...],
            top_k=self.router.top_k,
            mask_T=token_mask.reshape(-1),
        )
        zero = jnp.int32(0)
        aux = self.balance_weight * balance + self.z_weight * z
        load = jnp.zeros(self.num_experts, jnp.int32)
        nothing = jnp.float32(0)
        router = moejax.RouterStats(load.astype(jnp.float32), *[nothing] * 5)
        counts = ("invalid", "dropped", "over_capacity", "at_sender", "at_receiver", "rounds")
        return y.reshape(x.shape), moejax.MoEStats(
            aux_loss=aux,
            balance_loss=balance,
            z_loss=z,
            load_E=load,
            **dict.fromkeys(counts, zero),
            fill_V=jnp.ones(1),
            router=router,
        )


@pytest.mark.parametrize("layout", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 4)], ids=str)
def test_gradients_at_step_0_are_those_of_the_dense_oracle(layout, monkeypatch):
    run = small.config()
    trainer = small.Steps(run, *layout)
    batch = small.random_batch(run, 0)
    count = jnp.float32((batch["targets"] >= 0).sum())
    with jax.set_mesh(trainer.mesh):
        grads = jax.jit(jax.grad(make_loss(trainer.spec), has_aux=True))(
            trainer.state.params, trainer.put(batch), count, jax.random.key(0)
        )[0]
    params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p)), trainer.state.params)
    monkeypatch.setattr("moejax.transformer.MoE", DenseMoE)
    dense = small.Steps(run)
    expected = jax.jit(jax.grad(make_loss(dense.spec), has_aux=True))(
        params, jax.tree.map(jnp.asarray, batch), count, jax.random.key(0)
    )[0]
    for (path, b), a in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(grads), strict=True
    ):
        tolerance.assert_close(a, b, tolerance.F32_MODEL, jax.tree_util.keystr(path))


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    # The balance loss too: with parts of 2 of 8 sequences, of which one has fewer valid tokens.
    whole = small.config()
    parts = dataclasses.replace(whole, optimizer=dataclasses.replace(whole.optimizer, accumulation_steps=4))
    a, b = (losses(run, 2, 1, 3) for run in (parts, whole))
    np.testing.assert_allclose(a, b, rtol=tolerance.F32_MODEL)


def test_bf16_trains_over_f32_parameters():
    run = small.config(
        precision="bf16", steps=30, optimizer=OptimizerConfig(warmup_steps=1, learning_rate=1e-2)
    )
    trainer = small.Steps(run)
    batch = small.random_batch(run, 0)
    reports = [float(trainer.take(batch)["loss"]) for _ in range(30)]
    exact = losses(dataclasses.replace(run, precision="f32"), 1, 1, 1)[0, 0]
    assert reports[0] == pytest.approx(exact, rel=tolerance.BF16)
    assert reports[-1] < 0.7 * reports[0]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trainer.state.params))


@pytest.mark.parametrize("layout", [pytest.param((1, 1), marks=pytest.mark.slow), (2, 4)], ids=str)
def test_the_compiled_step_never_talks_to_the_host(layout):
    run = small.config()
    trainer = small.Steps(run, *layout)
    with jax.set_mesh(trainer.mesh):
        text = trainer.step.lower(trainer.state, trainer.put(small.random_batch(run, 0))).compile().as_text()
    for word in ("callback", "infeed", "outfeed", "send(", "recv("):
        assert word not in text, word
    assert ("all-to-all" in text) == (layout != (1, 1)), "the scan does see what is in the program"


def test_a_host_callback_would_be_seen():
    text = jax.jit(lambda x: jax.debug.print("{}", x)).lower(1.0).compile().as_text()
    assert "callback" in text


@pytest.mark.landing
def test_global_norm_counts_every_expert_once():
    run = small.config()
    norms = []
    for layout in ((1, 1), (1, 4)):
        norms.append(float(small.Steps(run, *layout).take(small.random_batch(run, 0))["grad_norm"]))
    np.testing.assert_allclose(norms, norms[0], rtol=tolerance.F32_MODEL)


def test_state_lies_where_its_parameter_lies():
    trainer = small.Steps(small.config(optimizer=OptimizerConfig(name="muon")), 2, 4)
    specs = {
        jax.tree_util.keystr(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.state)
        if "w_in" in jax.tree_util.keystr(path)
    }
    assert len(specs) == 2, "the parameter and Muon's one moment"
    assert all(tuple(spec)[:2] == (None, "expert") for spec in specs.values())


def test_named_parameters_are_counted():
    spec = small.Steps(small.config()).spec
    total, active = spec.count_parameters()
    experts = 2 * 8 * (16 * 2 * 8 + 8 * 16)
    assert total == sum(leaf.size for leaf in jax.tree.leaves(spec.abstract))
    assert total - active == experts * 6 // 8


def test_active_parameters_follow_the_router_of_each_layer():
    # Layer 1 alone has one expert per token instead of two.
    run = small.config()
    moe = dataclasses.replace(run.model.moe, layer_routers="1:switch")
    spec = ModelSpec.from_config(
        dataclasses.replace(run, model=dataclasses.replace(run.model, moe=moe)), small.VOCAB
    )
    plain = ModelSpec.from_config(run, small.VOCAB)
    one_expert = 16 * 2 * 8 + 8 * 16
    assert plain.active_matrix_parameters() - spec.active_matrix_parameters() == one_expert
    (total, active), (plain_total, plain_active) = spec.count_parameters(), plain.count_parameters()
    assert total == plain_total and plain_active - active == one_expert


def test_metrics_of_a_dense_model_have_no_moe_fields():
    run = small.config(model=ModelConfig(num_layers=2, d_model=16, num_heads=2, moe_layers="none"))
    metrics = small.Steps(run).take(small.random_batch(run, 0))
    assert not [name for name in metrics if name.startswith("moe/")] and float(metrics["aux_loss"]) == 0


def test_one_expert_counts_as_dead_when_it_gets_no_token():
    run = small.config(
        model=ModelConfig(num_layers=2, d_model=16, num_heads=2, moe=MoEConfig(num_experts=512, d_hidden=2)),
        log=LogConfig(every=1, dead_after=1, tensorboard=False),
    )
    metrics = small.Steps(run).take(small.random_batch(run, 0))
    chosen = 2 * (8 * 16 - 3)
    assert int(metrics["moe/dead_experts"]) >= 2 * (512 - chosen)
    assert float(metrics["moe/max_vio"]) > 0 and int(metrics["moe/rounds"]) == 1
    assert float(metrics["moe/dropped_fraction"]) == 0 and int(metrics["moe/invalid"]) == 0


def test_fsdp_splits_matrices_and_their_moments():
    run = small.config(mesh=MeshConfig(fsdp=True))
    trainer = small.Steps(run, 2, 2, tensor=2)
    specs = {
        jax.tree_util.keystr(path): leaf.sharding.spec
        for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.state)
    }
    experts_in = [spec for name, spec in specs.items() if "w_in" in name]
    assert len(experts_in) == 3, "the parameter and AdamW's two moments"
    assert all(tuple(spec) == (None, "expert", "data", None, "tensor") for spec in experts_in)
    assert all("data" not in spec for name, spec in specs.items() if "norm" in name)


def test_nnx_state_and_plain_parameters_are_the_same_tree():
    trainer = small.Steps(small.config())
    model = trainer.spec.merge(trainer.state.params)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(model)), trainer.state.params)
    assert optax.tree.size(trainer.state.params) == trainer.spec.count_parameters()[0]


def four_layers():
    """Layers 0 and 2 dense, 1 and 3 MoE: period 2, two repetitions."""
    model = dataclasses.replace(small.config().model, num_layers=4, moe_layers="odd")
    return small.Steps(small.config(model=model))


def spoiled(params, block, repetition, *names, value):
    """The parameters with those of one layer, `repetition * 2 + block`, filled with a value."""
    params = jax.tree.map(lambda leaf: leaf, params)
    inner = params["blocks"][block]
    for name in names[:-1]:
        inner = inner[name]
    inner[names[-1]] = inner[names[-1]].at[repetition].set(value)
    return params


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ((0, 1, "ffn", "w_out"), np.nan, "layer 2 is the first whose output is not finite"),
        # The z-loss overflows: every output is finite, but not what goes back from this router.
        ((1, 0, "ffn", "router", "w_DE"), 1e25, "the gradient of ffn_norm.scale in layer 1 is not finite"),
        pytest.param(
            (1, 1, "ffn", "router", "w_DE"),
            1e25,
            "the gradient of ffn_norm.scale in layer 3 is not finite",
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_a_nan_is_traced_to_its_layer(place, value, message):
    trainer = four_layers()
    trainer.state = dataclasses.replace(
        trainer.state, params=spoiled(trainer.state.params, *place, value=value)
    )
    reporter = Reporter(None, trainer.spec, trainer.mesh, lambda: "there is no checkpoint yet")
    reporter.add(7, trainer.take(small.random_batch(small.config(), 0)), logged=False)
    with pytest.raises(TrainingFailed, match=f"step 7: .*{message}"):
        reporter.flush()


def test_a_batch_that_gives_nan_is_skipped_and_counted(caplog):
    run = small.config(checkpoint=CheckpointConfig(on_nan="skip"))
    trainer, batch = small.Steps(run), small.random_batch(run, 0)
    reporter = Reporter(Bystander(), trainer.spec, trainer.mesh, lambda: "there is no checkpoint yet")
    reporter.add(1, trainer.take(batch), logged=False)
    good = jax.device_get(trainer.state)
    params = good.params | {"embedding": good.params["embedding"] * np.nan}
    spoiled_state = dataclasses.replace(good, params=params)
    trainer.state = jax.device_put(spoiled_state)
    reporter.add(2, trainer.take(batch), logged=False)
    with caplog.at_level(logging.WARNING, "moejax"):
        reporter.flush()
    (warning,) = caplog.messages
    assert warning.startswith("step 2: loss nan: ") and "the batch is skipped, the 1. one" in warning
    left = jax.device_get(trainer.state)
    assert left.step == 2
    trainer.state = jax.device_put(dataclasses.replace(left, params=good.params))
    warmup = run.optimizer.learning_rate / run.optimizer.warmup_steps
    used = float(trainer.take(batch)["learning_rate"])
    assert used == pytest.approx(2 * warmup, rel=1e-6), "that of the second update, not of the third step"
    jax.tree.map(np.testing.assert_array_equal, dataclasses.replace(left, step=good.step), spoiled_state)


def test_parameters_that_an_update_broke_are_named_with_their_layer():
    trainer = four_layers()
    reporter = Reporter(None, trainer.spec, trainer.mesh, lambda: "there is no checkpoint yet")
    reporter.refuse_broken(7, trainer.state.params)
    params = spoiled(trainer.state.params, 1, 1, "ffn", "experts", "w_in", value=np.inf)
    with pytest.raises(
        TrainingFailed, match=r"step 7: the update made parameters .*ffn\.experts\.w_in in layer 3"
    ):
        reporter.refuse_broken(7, params)
    params = {**params, "embedding": params["embedding"] * np.nan}
    with pytest.raises(TrainingFailed, match=r"ffn\.experts\.w_in in layer 3"):
        reporter.refuse_broken(7, params)


class Drawn(moejax.routing.TopK):
    """Chooses by random number and by token id alone; what it saw can be read off the experts' load."""

    def __call__(self, x_TD, *, token_mask_T=None, token_ids_T=None, key=None):
        routing = super().__call__(x_TD, token_mask_T=token_mask_T)
        shift = jax.random.randint(key, (), 0, self.w_DE.shape[1])
        ids_TK = (token_ids_T[:, None] + shift + jnp.arange(self.top_k)[None]) % self.w_DE.shape[1]
        return dataclasses.replace(routing, ids_TK=jnp.where(routing.valid_T[:, None], ids_TK, -1))


@pytest.mark.landing
def test_routers_get_token_ids_and_a_key_of_their_layer_and_step(monkeypatch):
    monkeypatch.setitem(moejax.routing.ROUTERS, "topk", Drawn)
    run = small.config(model=dataclasses.replace(small.config().model, num_layers=4))
    batch = small.random_batch(run, 0)

    def loads(layout, step):
        """Load of each layer's experts, minus the random shift: the histogram of the token ids."""
        trainer = small.Steps(run, *layout)
        key = jax.random.fold_in(jax.random.wrap_key_data(trainer.state.key), step)
        with jax.set_mesh(trainer.mesh):
            report = jax.jit(make_loss(trainer.spec))(
                trainer.state.params, trainer.put(batch), jnp.float32(1), key
            )[1]
        return np.asarray(report["stats"].load_E)

    load_LE = loads((1, 1), 0)
    np.testing.assert_array_equal(load_LE, loads((2, 4), 0), "the layout changes no draw")
    assert (load_LE != loads((1, 1), 1)).any(), "another step, another draw"
    assert (load_LE != load_LE[0]).any(), "another layer, another draw"
    ids = batch["tokens"][batch["segments"] > 0]
    count_E = np.bincount(np.concatenate([ids, ids + 1]) % 8, minlength=8)
    for load_E in load_LE:
        assert any((np.roll(count_E, shift) == load_E).all() for shift in range(8)), "chosen by token id"

    trainer = small.Steps(run)
    metrics = [trainer.take(batch) for _ in range(2)]
    assert all(np.isfinite(float(m["loss"])) for m in metrics), "and it can be differentiated"


def test_a_router_that_draws_nothing_costs_no_random_numbers():
    def draws(compiled):
        return re.search(r"u32\[[^\n]* xor\(", compiled.as_text()) is not None

    run = small.config()
    trainer = small.Steps(run)
    with jax.set_mesh(trainer.mesh):
        assert not draws(trainer.step.lower(trainer.state, trainer.put(small.random_batch(run, 0))).compile())
    assert draws(jax.jit(jax.random.bits).lower(jax.random.key(0)).compile()), "drawing would be seen"


@pytest.mark.parametrize("tied", [True, False])
def test_only_products_count_as_work(tied):
    model = dataclasses.replace(small.config().model, tie_embeddings=tied)
    spec = ModelSpec.from_config(small.config(model=model), small.VOCAB)
    attention, router, experts = 4 * 16 * 16, 16 * 8, 2 * (16 * 2 * 8 + 8 * 16)
    output = small.VOCAB * 16
    assert spec.active_matrix_parameters() == 2 * (attention + router + experts) + output


def test_peaks_are_those_of_the_precision():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "f32") == 67e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("cpu", "f32") is None


def test_programs_for_gpus_are_asked_for_a_fixed_order_of_summation_and_for_overlap():
    def options_on(platform, chunks, **sizes):
        devices = np.asarray([types.SimpleNamespace(platform=platform)])
        shape = {"data": 1, "expert_node": 1, "expert": 1, "tensor": 1} | sizes
        return compiler_options(types.SimpleNamespace(devices=devices, shape=shape), chunks)

    in_flight = "xla_gpu_experimental_parallel_collective_overlap_limit"
    assert options_on("cpu", 4, expert=8) is None
    assert options_on("gpu", 4)[in_flight] == 1
    assert options_on("gpu", 4, expert=8)[in_flight] == 4
    options = options_on("gpu", 4, expert_node=8, expert=8)
    assert options == {"xla_gpu_exclude_nondeterministic_ops": True, in_flight: 8}
    double = jax.jit(lambda x: 2 * x, compiler_options=options)
    assert int(double(jnp.int32(3))) == 6, "XLA knows the option"
