"""What a run is: frozen dataclasses, one field one meaning, defaults that train.

The docstring below each field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from and how it is cut."""

    path: str | None = None
    """Text, JSONL, Parquet, .npy or .bin file, a folder or a glob of them. Unset: the source text of the
    Python standard library."""
    validation_path: str | None = None
    """Validation data of its own. Unset: `validation_fraction` of `path`."""
    validation_fraction: float = 0.1
    """Share held out for validation: the end of a single document, otherwise whole documents."""
    text_field: str = "text"
    """The field of JSONL and Parquet records that holds the text."""
    tokenizer: str = "bytes"
    """`bytes`, `char`, or the path of a Hugging Face `tokenizer.json`."""
    batch_size: int = 16
    """Sequences per optimizer step over all devices: the same on every layout."""
    sequence_length: int = 128
    """Tokens per sequence."""


@dataclass(frozen=True)
class RoutingConfig:
    """Options of the routers and their losses."""

    normalize: bool | None = None
    """Make a token's combine weights sum to one. Unset: where it has several."""
    balance_weight: float = 0.01
    """Weight of the load-balance loss, over the tokens of all devices (of each accumulation part)."""
    z_weight: float = 0.001
    """Weight of the router z-loss."""


@dataclass(frozen=True)
class MoEConfig:
    """The Mixture-of-Experts layers."""

    num_experts: int = 8
    """Experts per layer."""
    top_k: int | None = None
    """Experts per token. Unset: the router's own number."""
    d_hidden: int | None = None
    """Hidden width of one expert. Unset: `model.d_hidden` divided by the experts per token."""
    router: str = "topk"
    """Name of the router."""
    exchange: str = "all_to_all"
    """Name of the exchange that carries rows between devices."""
    routing: RoutingConfig = field(default_factory=RoutingConfig)


@dataclass(frozen=True)
class ModelConfig:
    """The decoder-only transformer."""

    num_layers: int = 4
    """Transformer blocks."""
    d_model: int = 128
    """Width of the residual stream."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int | None = None
    """Key and value heads (grouped-query attention). Unset: `num_heads`."""
    d_hidden: int | None = None
    """Hidden width of a dense FFN. Unset: 8/3 of `d_model`, rounded up to a multiple of 8."""
    activation: Literal["swiglu", "gelu"] = "swiglu"
    """Kind of FFN, for dense layers and experts alike."""
    moe_layers: str = "all"
    """Which layers are MoE: `all`, `none`, `odd`, `even`, or their numbers from 0, such as `1,3`."""
    vocab_size: int | None = None
    """Rows of the embedding. Unset: the tokenizer's vocabulary."""
    tie_embeddings: bool = True
    """Use the embedding as output projection."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding's wavelengths."""
    remat: Literal["none", "dots", "full"] = "none"
    """What backward computes again: nothing, all but matrix products, or all. Routing decisions are kept."""
    loss_chunk: int = 4096
    """Tokens per device whose logits stand in memory at once."""
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass(frozen=True)
class OptimizerConfig:
    """Optax optimizer, learning-rate schedule and clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for matrices with AdamW for the rest."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    adam_learning_rate: float | None = None
    """Peak learning rate of what Muon leaves to AdamW. Unset: `learning_rate`."""
    muon_iterations: int = 5
    """Newton-Schulz iterations of Muon."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """Decay after warm-up: cosine over all steps, linear over the last `decay_fraction` of them, or none."""
    warmup_steps: int = 100
    """Steps of linear warm-up; may exceed `steps`."""
    decay_fraction: float = 0.2
    """Share of the steps in which `wsd` decays."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    b1: float = 0.9
    """Decay of Adam's first moment."""
    b2: float = 0.95
    """Decay of Adam's second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms and biases have none."""
    clip_norm: float = 1.0
    """Largest global gradient norm; every expert counts once."""
    accumulation_steps: int = 1
    """Parts into which a batch is cut; their gradients are averaged before the one optimizer step."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices as a grid. Tokens are split over all axes, experts over `expert`."""

    data: int = -1
    """Size of the data axis; -1 takes all remaining devices."""
    expert: int = 1
    """Size of the expert axis; must divide `model.moe.num_experts`."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Orbax checkpoints: asynchronous, hashed, the newest and the best kept."""

    every: int = 500
    """Steps between checkpoints; the last step always has one. 0: only the last step."""
    keep_last: int = 2
    """Newest checkpoints kept."""
    keep_best: int = 1
    """Checkpoints kept for their evaluation loss. Above 0, an evaluation better than all before it makes a checkpoint,
    unless `every` is 0. What is compared is the loss over the same `eval.max_batches`."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on the validation split."""

    every: int = 500
    """Steps between evaluations during training. 0: only after the last step."""
    max_batches: int | None = None
    """Batches per evaluation during training. Unset: the whole split, as in the last evaluation always."""


@dataclass(frozen=True)
class LogConfig:
    """What is reported, how often."""

    every: int = 10
    """Steps between logged steps; the first and the last are always logged."""
    tensorboard: bool = True
    """Also write TensorBoard event files."""


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    steps: int = 1000
    """Optimizer steps."""
    seed: int = 0
    """Seed of parameters and data order."""
    workdir: str | None = None
    """Run directory. Unset: runs/<config>-<date>-<time>."""
    precision: Literal["f32", "bf16"] = "f32"
    """Compute type over f32 parameters: true f32 products, or bf16."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
