"""What a step costs: floating-point operations, and what devices can do.

Shapes: D model width, F hidden width, L layers, S positions, H heads, h width of a head.
"""

from __future__ import annotations

import jax

# Dense bf16 peak of one device in FLOP/s, from the vendors' data sheets, without sparsity.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Dense bf16 peak of this device in FLOP/s; None where it is not known."""
    matches = (peak for name, peak in PEAK_FLOPS.items() if device.device_kind.startswith(name))
    return next(matches, None)


def train_flops_per_token(
    active_matrix_parameters: int, num_layers: int, d_model: int, sequence_length: int
) -> int:
    """Forward and backward FLOPs of one token: 6 per active matrix parameter, plus causal attention.

    Attention scores and values take 2 * 2 * D * S / 2 per token and layer forward under a causal mask, and twice that
    backward (PaLM, appendix B, with the mask counted).
    """
    return 6 * active_matrix_parameters + 6 * num_layers * d_model * sequence_length
