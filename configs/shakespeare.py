"""A character-level MoE on tinyshakespeare, within the active parameters of nanoGPT's CPU recipe.

    moejax train configs/shakespeare.py --data.path tinyshakespeare.txt

The text is one file, its first 90 % for training, its last 10 % for validation. nanoGPT's recipe has 4 layers, 4
heads and width 128, about 0.80 million active parameters; this has the same depth and width and 0.52 million.

Hardware: two CPU cores; 1.56 nats per character in about a minute.
"""

from train.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)


def config() -> TrainConfig:
    """4 MoE layers of 8 experts, 2 per token; each batch 16 × 128 characters."""
    return TrainConfig(
        steps=660,
        data=DataConfig(path="tinyshakespeare.txt", tokenizer="char", batch_size=16, sequence_length=128),
        model=ModelConfig(num_heads=2, moe=MoEConfig(num_experts=8, top_k=2, d_hidden=80)),
        optimizer=OptimizerConfig(
            name="muon",
            learning_rate=0.02,
            adam_learning_rate=0.008,
            muon_iterations=4,
            schedule="wsd",
            decay_fraction=0.8,
            warmup_steps=20,
            final_fraction=0.02,
        ),
        checkpoint=CheckpointConfig(every=0),
        eval=EvalConfig(every=0),
        log=LogConfig(every=20),
    )
