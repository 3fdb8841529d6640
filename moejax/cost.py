"""What a step costs: floating-point operations, bytes between devices, and what devices can do.

Shapes: D model width, F hidden width, L layers, S positions, H heads, h width of a head, T tokens of a device,
P devices on an axis, B rows of a bucket, E experts, K experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

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


def share_of_tokens(num_experts: int, below: int, top_k: int) -> float:
    """Chance that one of K different experts, chosen without preference, is among the `below` of one destination.

    1 - C(E - below, K) / C(E, K).
    """
    if top_k > num_experts - below:
        return 1.0
    return 1 - math.comb(num_experts - below, top_k) / math.comb(num_experts, top_k)


@dataclass(frozen=True)
class Link:
    """What a device reaches towards its peers along a mesh axis.

    Fields:
      bandwidth: bytes per second out of one device.
      latency: seconds per message.
      memory_bandwidth: bytes per second of a copy within the device, read and write counted.
    """

    bandwidth: float
    latency: float
    memory_bandwidth: float


# Reached on H100 and H200 within a node: 155 of 160 GB/s of NVLink (published for DeepEP), copies at 4.3 TB/s. Between
# nodes 400 Gbit/s per device; 45 GB/s arrive.
NVLINK = Link(155e9, 5e-6, 4.3e12)
NETWORK = Link(45e9, 15e-6, 4.3e12)


def exchange_bytes(
    exchange: str,
    *,
    tokens: int,
    bucket_rows: int,
    share: float,
    devices: int,
    row_bytes: tuple[int, int],
    top_k: int,
) -> tuple[int, int]:
    """Bytes that one device sends to others there, and back, over one axis in one forward pass.

    Args:
      tokens: T.
      bucket_rows: B, of "all_to_all"; clipping aside, "ragged" sends `share` of T to each device instead.
      row_bytes: of one row on the wire, there and back. Beside it go 8 * K bytes of ids and weights, and K bytes of
        mask come back.
    """
    rows = {"all_to_all": bucket_rows, "all_gather": tokens, "ragged": round(share * tokens)}[exchange]
    sent = (devices - 1) * rows
    return sent * (row_bytes[0] + 8 * top_k), sent * (row_bytes[1] + top_k)


def exchange_seconds(exchange: str, link: Link, **shapes) -> float:
    """Estimated time of one forward pass over one axis: wire, messages, and the copies into and out of buckets.

    Args:
      shapes: as of `exchange_bytes`.
    """
    there, back = exchange_bytes(exchange, **shapes)
    collectives = {"all_to_all": 4, "all_gather": 4, "ragged": 5}[exchange]
    messages = collectives * (shapes["devices"] - 1)
    # Rows are read and written once more on each side; a gather needs no buckets.
    copied = 0 if exchange == "all_gather" else 2 * (there + back)
    return (there + back) / link.bandwidth + messages * link.latency + copied / link.memory_bandwidth


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do, see `train.rates`; the constants of `shadows_that_pay`.

    Fields:
      link: towards its peers along the expert axis.
      flops: floating-point operations per second in a product.
    """

    link: Link
    flops: float


def shadows_that_pay(
    loads: Sequence[Sequence[float]],
    rates: Rates,
    *,
    devices: int,
    row_bytes: float,
    expert_bytes: float,
    row_flops: float,
    at_most: int,
    now: int = 0,
    margin: float = 0.0,
) -> tuple[int, list[float]]:
    """How many of the experts in most demand each layer should copy to all devices, and what every number costs.

    After the shadowing policy of FasterMoE (He et al. 2022, PPoPP), one number for all layers. The busiest device sets
    the time of a layer: its rows cross the wire four times, forward and backward, and are multiplied three times the
    forward pass's operations. A copied expert's rows stay where they are; for that its parameters are summed over all
    devices once, and its gradients once. Every choice counts as a row that travels, though a token crosses once for all
    its experts on one device and some are there already: where K is not small, copies save less than this.

    Args:
      loads: of each layer, the rows that each of its experts gets in a pass from all devices that share them; a
        multiple of `devices` of them.
      devices: that share the experts.
      row_bytes: of one row on the wire.
      expert_bytes: of the parameters of one expert, on one device.
      row_flops: of one row through one expert, forward, on one device.
      at_most: largest number to be copied.
      now: the number at present.
      margin: another number is taken only if it saves more than this share of what `now` costs.

    Returns:
      The number, and the seconds of all layers in a pass, forward and backward, for each number from 0 to `at_most`.
    """
    reduced = 2 * (devices - 1) / devices * expert_bytes

    def layer_seconds(load_E: Sequence[float], count: int) -> float:
        per_device = len(load_E) // devices
        copied = set(sorted(range(len(load_E)), key=lambda expert: -load_E[expert])[:count])
        at_home = sum(load_E[expert] for expert in copied) / devices
        busiest = max(
            sum(load_E[e] for e in range(device * per_device, (device + 1) * per_device) if e not in copied)
            for device in range(devices)
        )
        wire = 4 * busiest * row_bytes / rates.link.bandwidth
        compute = 3 * (busiest + at_home) * row_flops / rates.flops
        copies = 2 * (
            count * reduced / rates.link.bandwidth + (count > 0) * rates.link.latency * (devices - 1)
        )
        return wire + compute + copies

    numbers = range(max(at_most, now) + 1)
    seconds = [sum(layer_seconds(load_E, count) for load_E in loads) for count in numbers]
    best = min(range(at_most + 1), key=seconds.__getitem__)
    return best if seconds[now] - seconds[best] > margin * seconds[now] else now, seconds


def cheapest_exchange(link: Link, **shapes) -> tuple[str, dict[str, float]]:
    """What "auto" takes, and the estimated seconds of each it can take; arguments as of `exchange_seconds`."""
    estimates = {name: exchange_seconds(name, link, **shapes) for name in ("all_to_all", "all_gather")}
    return min(estimates, key=estimates.__getitem__), estimates
