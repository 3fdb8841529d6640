"""What a run is: frozen dataclasses, one field one meaning, defaults that train.

The docstring below each field is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# Values of `data.tokenizer` that are no path.
TOKENIZER_NAMES = ("bytes", "char")


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
    """Losses of any router, then options of some: one that the chosen router does not have is an error.

    Unset: the router's own.
    """

    balance_weight: float | None = None
    """Weight of the load-balance loss."""
    balance_over: Literal["batch", "micro_batch", "sequence"] = "batch"
    """Tokens that are to be balanced: all of a step (with accumulation at the price of one more forward pass), those of
    one accumulation part, or each sequence by itself; always over all devices."""
    z_weight: float | None = None
    """Weight of the router z-loss."""
    importance_weight: float | None = None
    """Weight of the importance loss: squared variation of the experts' summed weights."""
    load_weight: float | None = None
    """Weight of the load loss: squared variation of the experts' expected load; router noisy."""
    orthogonality_weight: float | None = None
    """Weight of the orthogonality loss of the router's matrix: all routers with a linear layer."""
    normalize: bool | None = None
    """Make a token's combine weights sum to one: topk, noisy, sigmoid, cosine, sinkhorn, swipe, topology, rounded."""
    router_bias: bool | None = None
    """Add a learned bias to the logits: all routers with a linear layer."""
    groups: int | None = None
    """Groups of tokens of a batch (of an accumulation part), each with capacities and budgets of its own."""
    capacity_factor: float | None = None
    """Choices an expert accepts, as a multiple of its even share: switch, gshard, expert_choice."""
    eval_capacity_factor: float | None = None
    """The same in evaluation: switch, gshard, expert_choice."""
    drop_by: Literal["position", "score", "random"] | None = None
    """Who is served first where a capacity does not suffice: switch, gshard."""
    jitter: float | None = None
    """The router sees its input times 1 ± this much at random: switch."""
    random_second: bool | None = None
    """Take the second expert by chance: gshard."""
    bias_rate: float | None = None
    """Step of the bias that balances without a loss: sigmoid. Unset: 3 / `steps`, from 0.001 to 0.03."""
    expert_groups: int | None = None
    """Parts into which the experts are cut: topk, sigmoid."""
    limit_groups: int | None = None
    """Parts in which a token may choose: topk, sigmoid."""
    scale: float | None = None
    """Factor on the combine weights: topk, sigmoid."""
    max_experts: int | None = None
    """Most experts of one token: expert_choice, rounded."""
    iterations: int | None = None
    """Rounds of Sinkhorn's algorithm: sinkhorn."""
    hash_seed: int | None = None
    """Seed of the hash: hash."""
    expert: int | None = None
    """The first expert that gets everything: one."""
    projection: int | None = None
    """Width of the space in which angles are taken: cosine."""
    devices: int | None = None
    """Parts of the experts with a budget each: swipe."""
    budget_factor: float | None = None
    """Budget as a multiple of the even share: swipe."""
    nodes: int | None = None
    """Parts of the experts that are a node each: topology."""
    off_node_share: float | None = None
    """Largest share of the choices that leave the node: topology."""
    tile: int | None = None
    """Multiple to which each expert's tokens are rounded: rounded."""
    rounding: Literal["nearest", "up", "down"] | None = None
    """How they are rounded: rounded."""


@dataclass(frozen=True)
class MoEConfig:
    """The Mixture-of-Experts layers."""

    num_experts: int = 8
    """Experts per layer."""
    layer_experts: str | None = None
    """Experts of single layers in place of `num_experts`, such as `0:4,3:16`. Layers compile as one loop where the
    pattern of their kinds repeats."""
    top_k: int | None = None
    """Experts per token. Unset: the router's own number."""
    d_hidden: int | None = None
    """Hidden width of one expert. Unset: `model.d_hidden` divided by the experts per token."""
    router: str = "topk"
    """Name of the router."""
    layer_routers: str | None = None
    """Routers of single layers in place of `router`, such as `0:hash,3:switch`; they have the options they know."""
    exchange: str = "all_to_all"
    """How rows travel between devices: `all_to_all`, `all_gather`, `ragged`, or `auto`, which takes the cheaper of the
    first two for every mesh axis, as estimated from what is measured when the run begins."""
    overflow: Literal["rounds", "drop"] = "rounds"
    """What becomes of choices beyond the static buffers: carried out in further rounds, or dropped and counted."""
    capacity_factor: float | None = None
    """Size of the buffers, under `drop` also of every expert's capacity, in units of what balanced choices need.
    Unset: 1.25 under `drop`, else 1.15."""
    chunks: int = 1
    """Pieces in which the tokens go through a layer, so that one travels while another is computed."""
    shadow: int | Literal["auto"] = 0
    """Experts that are copied to every device of the expert axes in each step: those in most demand of late. `auto`: as
    many, 8 at most, as pay by measured times and the load so far; decided at the beginning and after evaluations."""
    wire: Literal["none", "bf16", "fp8"] = "none"
    """Compression of rows between devices: none, bf16, or fp8 towards the experts and bf16 back."""
    received: Literal["keep", "resend"] = "keep"
    """Rows received from other devices: kept for backward, or sent once more in backward, which saves their memory."""
    expert_bias: bool = False
    """Give each expert biases. They cost speed: the experts' products are then not fused."""
    shared_experts: int = 0
    """Experts' widths of dense FFN that every token passes as well."""
    shared_hidden: int | None = None
    """Hidden width of that FFN. Unset: `shared_experts` times the width of an expert."""
    shared_gate: bool = False
    """Multiply its result by a learned sigmoid of the token."""
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
    activation: Literal[
        "swiglu", "gelu", "gelu_exact", "relu", "relu2", "geglu", "reglu", "clamped_swiglu"
    ] = "swiglu"
    """Kind of FFN, for dense layers and experts alike. `gelu` and `geglu` take GELU's tanh approximation, `relu2`
    squares relu, `clamped_swiglu` is GPT-OSS's."""
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
    """Tokens per device whose logits are in memory at once."""
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
    """Decoupled weight decay of matrices; norms and biases have none, nor has what Muon leaves to Adam."""
    clip_norm: float = 1.0
    """Largest global gradient norm; every expert counts once."""
    accumulation_steps: int = 1
    """Parts into which a batch is cut; their gradients add up to the whole batch's before the one optimizer step."""


@dataclass(frozen=True)
class MeshConfig:
    """Devices as a grid. Tokens are split over all axes but `tensor`, experts over `expert_node` and `expert`."""

    data: int = -1
    """Size of the data axis; -1 takes all remaining devices."""
    expert_node: int = 1
    """Nodes over which the experts are split; a token then crosses to each of them at most once."""
    expert: int = 1
    """Devices, of each node, over which the experts are split. `mesh.expert_node` x `mesh.expert` must divide
    `model.moe.num_experts`."""
    tensor: int = 1
    """Devices over which the hidden width of every FFN is split; they share the same tokens."""
    fsdp: bool = False
    """Split matrices and their optimizer state over the data axis too, and gather each where it is needed."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Orbax checkpoints: asynchronous, hashed, the newest and the best kept."""

    every: int = 500
    """Steps between checkpoints; the last step always has one. 0: only the last step."""
    every_minutes: float = 0.0
    """Minutes after which the next logged step has a checkpoint too. 0: steps alone count."""
    wait: bool = False
    """Begin the next step only when a checkpoint is complete. A kill then costs at most the steps between two
    checkpoints; otherwise also those made while one was being written."""
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    """What a step that is not finite does: end the run; change nothing but the count of steps, so that its batch is
    skipped; or go back to the last checkpoint and on with the batch after the bad one, ten times at most. All keep the
    checkpoints there are."""
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
    experts_every: int = 20
    """Steps between logged steps that also have the numbers of each MoE layer and expert. 0: never."""
    dead_after: int = 50
    """Steps without a token after which an expert counts as dead."""
    drop_limit: float = 0.1
    """Share of dropped choices from which on there is a warning."""
    spike_factor: float = 10.0
    """Gradient norm, as a multiple of the median of the last hundred steps, that gives a warning. 0: never."""
    stall_factor: float = 20.0
    """A step that takes longer than so many times the median ends the run, with all stacks of all processes and the
    names of those that did not arrive; the same command goes on from the last checkpoint. 0: never."""
    stall_seconds: float = 300.0
    """A step is never considered stalled before this many seconds. The time in which the process is suspended does not
    count."""
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
    """Run directory. Unset: a new one, runs/<config>-<date>-<time>."""
    precision: Literal["f32", "bf16"] = "f32"
    """Compute type over f32 parameters: true f32 products, or bf16."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
