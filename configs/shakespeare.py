"""A character-level MoE on tinyshakespeare, held to the active parameters of nanoGPT's CPU recipe.

    moejax train configs/shakespeare.py --data.path tinyshakespeare.txt

The text is one file, first 90 % for training, last 10 % for validation. nanoGPT's recipe has 4 layers, 4
heads and width 128, about 0.80 million active parameters.

Hardware: two CPU cores.
"""

from train.config import DataConfig, EvalConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    """4 MoE layers of 8 experts, 2 per token; each batch 12 × 64 characters."""
    return TrainConfig(
        steps=2000,
        data=DataConfig(path="tinyshakespeare.txt", tokenizer="char", batch_size=12, sequence_length=64),
        model=ModelConfig(moe=MoEConfig(num_experts=8, top_k=2)),
        optimizer=OptimizerConfig(name="muon", learning_rate=0.02, adam_learning_rate=2e-3, warmup_steps=100),
        eval=EvalConfig(every=0),
    )
