"""What a step costs: floating-point operations, and what devices can do.

Shapes: D model width, F hidden width, L layers, S positions, H heads, h width of a head.
"""

from __future__ import annotations

# Dense peak of one device in FLOP/s by type of product, from the vendors' data sheets, without sparsity. f32 is true
# f32, as `precision = f32` computes: not TF32, which has a mantissa of 10 bits.
PEAK_FLOPS: dict[str, dict[str, float]] = {
    "NVIDIA A100": {"bf16": 312e12, "f32": 19.5e12},
    "NVIDIA H100 PCIe": {"bf16": 756e12, "f32": 51e12},
    "NVIDIA H100": {"bf16": 989e12, "f32": 67e12},
    "NVIDIA H200": {"bf16": 989e12, "f32": 67e12},
    "NVIDIA B200": {"bf16": 2250e12, "f32": 75e12},
}


def peak_flops(device_kind: str, precision: str) -> float | None:
    """Dense peak of a device in FLOP/s; None where it is not known.

    Args:
      device_kind: as jax names it, such as `NVIDIA H100 80GB HBM3`.
      precision: `bf16` or `f32`, of the products.
    """
    matches = (peaks for name, peaks in PEAK_FLOPS.items() if device_kind.startswith(name))
    return next(matches, {}).get(precision)


def train_flops_per_token(
    active_matrix_parameters: int, num_layers: int, d_model: int, sequence_length: int
) -> int:
    """Forward and backward FLOPs of one token: 6 per active matrix parameter, plus causal attention.

    Attention scores and values take 2 * 2 * D * S / 2 per token and layer forward under a causal mask, and twice that
    backward (PaLM, appendix B, with the mask counted).
    """
    return 6 * active_matrix_parameters + 6 * num_layers * d_model * sequence_length
