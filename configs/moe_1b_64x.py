"""An OLMoE-like model, 1 of 7 billion parameters active, for one node of GPUs.

    moejax train configs/moe_1b_64x.py --data.path 'shards/*.npy' --data.tokenizer tokenizer.json

Both files are yours to give: the tokenizer must be a Hugging Face `tokenizer.json`, the data may be text,
JSONL, Parquet or token shards made with that tokenizer.

Shape after OLMoE-1B-7B (Muennighoff et al., 2024, arXiv:2409.02060): 16 layers of width 2048, 16 heads, 64
experts of width 1024, 8 per token, sequences of 4096 tokens, balance loss 0.01, z-loss 0.001, combine
weights not normalised over the chosen experts.

Hardware: 8 GPUs with 80 GB or more.
"""

from train.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    RoutingConfig,
    TrainConfig,
)


def config() -> TrainConfig:
    """16 MoE layers, experts spread over the 8 GPUs."""
    return TrainConfig(
        steps=100_000,
        precision="bf16",
        data=DataConfig(tokenizer="tokenizer.json", batch_size=256, sequence_length=4096),
        model=ModelConfig(
            num_layers=16,
            d_model=2048,
            num_heads=16,
            tie_embeddings=False,
            remat="dots",
            moe=MoEConfig(
                num_experts=64,
                top_k=8,
                d_hidden=1024,
                routing=RoutingConfig(
                    normalize=False, balance_weight=0.01, balance_over="micro_batch", z_weight=0.001
                ),
            ),
        ),
        optimizer=OptimizerConfig(learning_rate=4e-4, warmup_steps=2500, accumulation_steps=16),
        mesh=MeshConfig(expert=8),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, max_batches=32),
    )
