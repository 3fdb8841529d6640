"""A small MoE language model on the source text of the Python standard library, done while you wait.

    moejax train configs/quickstart.py --workdir runs/quickstart

Hardware: two CPU cores.
"""

from train.config import CheckpointConfig, EvalConfig, ModelConfig, MoEConfig, OptimizerConfig, TrainConfig


def config() -> TrainConfig:
    """4 MoE layers of 8 experts, 2 per token, bytes as tokens."""
    return TrainConfig(
        steps=500,
        model=ModelConfig(moe=MoEConfig(num_experts=8, top_k=2)),
        optimizer=OptimizerConfig(name="muon", learning_rate=0.02, adam_learning_rate=2e-3, warmup_steps=50),
        checkpoint=CheckpointConfig(every=250),
        eval=EvalConfig(every=250, max_batches=20),
    )
