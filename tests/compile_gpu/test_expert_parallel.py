"""Expert parallelism on 8 and on 64 H200s: what travels under what, how much of it, and what a layer keeps.

Shapes: T tokens of one device, D model width, F expert hidden width, E experts, K experts per token, P devices of an
axis, B rows of a bucket, R rows of the experts' buffer.
"""

import functools
import math

import pytest

from moejax.cost import share_of_tokens
from moejax.levels import CAPACITY_FACTOR, REPEAT_FACTOR, ROW_TILE
from tests.compile_gpu.h200 import PRODUCTS, Program
from tests.compile_gpu.moe_program import Sizes, compile_moe

pytestmark = pytest.mark.compile_gpu

SIZES = Sizes(T=8192, D=4096, F=1024, E=128, K=8)
T, D, F, E, K = SIZES
CHUNKS = 4
ROUTER_FLOPS = 2 * T * D * E


@functools.cache
def program(count: int, **options) -> Program:
    return compile_moe(SIZES, count=count, **options)


def layer(nodes: int) -> Program:
    """A single layer, on so many nodes of 8."""
    return program(8 * nodes, nodes=nodes, chunks=CHUNKS)


def bucket(factor: float, tokens: float, below: int) -> int:
    """B where `tokens` tokens may go on to groups of `below` experts: so much more than balanced choices need."""
    return math.ceil(factor * share_of_tokens(E, below, K) * tokens / ROW_TILE) * ROW_TILE


def received_rows(nodes: int, factor: float = CAPACITY_FACTOR) -> list[int]:
    """P * B of each level, for one chunk, outermost first; with 8 devices on each axis."""
    tokens = T // CHUNKS
    if nodes == 1:
        return [8 * bucket(factor, tokens, E // 8)]
    return [8 * bucket(factor, tokens, E // 8), 8 * bucket(factor, 8 * tokens, E // 64)]


@pytest.mark.parametrize("depth", [None, 4])
def test_eight_gpus_compute_while_rows_travel(depth):
    """Of a layer's 16 exchanges of rows, or of those in a scan over layers; 14 could: the first and the last cannot."""
    (rows,) = received_rows(1)
    compiled = layer(1) if depth is None else program(8, depth=depth, chunks=CHUNKS)
    exchanges = compiled.exchanges(rows)
    exchanges = [exchange for exchange in exchanges if exchange.shape == f"bf16[{rows},{D}]"]
    assert len(exchanges) == 16
    assert sum(exchange.products > 0 for exchange in exchanges) >= 11
    assert sum(exchange.work > 0 for exchange in exchanges) >= 14


@pytest.mark.parametrize("depth", [None, 4])
def test_64_gpus_compute_while_rows_travel(depth):
    """On two levels; a hop of the last chunk on its way back, forward and backward, has nothing left beside it."""
    compiled = layer(8) if depth is None else program(64, nodes=8, depth=depth, chunks=CHUNKS)
    exchanges = [
        e for rows in received_rows(8) for e in compiled.exchanges(rows) if e.shape.endswith(f",{D}]")
    ]
    assert len(exchanges) == 32
    assert sum(exchange.products > 0 for exchange in exchanges) >= 22
    assert sum(exchange.work > 0 for exchange in exchanges) >= 30


@pytest.mark.parametrize("nodes", [1, 8])
def test_collectives(nodes):
    """Rows four times, choices and weights twice, the mask of what was served once; two loops for further rounds."""
    compiled = layer(nodes)
    assert compiled.loops_with_collectives == 2
    expected = {}
    for rows in received_rows(nodes):
        expected |= {
            f"all-to-all bf16[{rows},{D}]": 4 * CHUNKS,
            f"all-to-all f32[{rows},{2 * K}]": 2 * CHUNKS,
        }
        expected |= {f"all-to-all s8[{rows},{K}]": CHUNKS}
    # Further rounds: forward, and in backward forward again and the gradients.
    for rows in received_rows(nodes, CAPACITY_FACTOR * REPEAT_FACTOR):
        expected |= {
            f"all-to-all bf16[{rows},{D}]": 5 * CHUNKS,
            f"all-to-all f32[{rows},{2 * K}]": 3 * CHUNKS,
        }
        expected |= {f"all-to-all s8[{rows},{K}]": 2 * CHUNKS}
    found = compiled.collectives(at_least=0)
    assert {name: n for name, n in found.items() if name.startswith("all-to-all")} == expected
    # Everything else sums what is small: the router's gradient, the losses, whether another round is needed.
    others = {name: n for name, n in found.items() if not name.startswith("all-to-all")}
    assert {name.split()[0] for name in others} == {"all-reduce"}
    assert not compiled.collectives(at_least=4 * D * E + 1).keys() & others.keys()
    assert "replica_groups={{0},{1}" not in compiled.compiled, "a sum over an axis of one device"


@pytest.mark.parametrize("nodes", [1, 8])
def test_bytes_on_the_wire(nodes):
    """A token crosses to a device, or to a node, once; beyond the formula buckets are rounded up."""
    for rows, tokens, below in zip(received_rows(nodes), (T, 8 * T), (E // 8, E // 64), strict=False):
        formula = CAPACITY_FACTOR * 8 * share_of_tokens(E, below, K) * tokens
        assert formula <= CHUNKS * rows <= formula + CHUNKS * 8 * ROW_TILE
    rows_bytes, small_bytes = 2 * D, 4 * 2 * K  # there; K on the way back
    assert small_bytes <= 0.03 * rows_bytes


@pytest.mark.parametrize("nodes", [1, 8])
def test_no_dense_fallback(nodes):
    compiled = layer(nodes)
    assert compiled.dot_flops == [ROUTER_FLOPS] * len(compiled.dot_flops)
    # Per chunk 2 products forward and 4 backward; in the loops of further rounds 2, and all 6 once more but the last.
    assert sum(compiled.custom_calls[name] for name in PRODUCTS) == 13 * CHUNKS


# What a layer of a scan keeps, in bytes: its input and the pre-activations; the router's logits, in f32; of rows that
# were received themselves, and the ids and weights beside them; of shadows the copies, in f32, and the pre-activations
# of their rows. docs/dispatch.md explains it.
def kept_bytes(count: int, received: str, shadow: int = 0) -> int:
    layer_input, logits = 2 * T * D, 4 * T * E
    if count == 1:
        return layer_input + logits + 4 * T * K * F
    rows = 8 * bucket(CAPACITY_FACTOR, T, E // 8)
    rows_kept = 2 * rows * D if received == "keep" else 0
    shadows = 4 * shadow * 3 * D * F + 4 * T * min(shadow, K) * F
    pre_activations = round(4 * CAPACITY_FACTOR * T * K * F)
    return layer_input + logits + rows_kept + 8 * rows * K + pre_activations + shadows


@pytest.mark.parametrize(
    ("count", "options"),
    [
        (1, dict(received="keep")),
        (8, dict(received="keep")),
        (8, dict(received="resend")),
        (8, dict(received="keep", shadow=8)),
    ],
    ids=str,
)
def test_memory_per_layer(count, options):
    # From 2 layers to 8: between neighbouring depths what stands beside at the peak jumps by a few per cent of a layer.
    at = {depth: program(count, depth=depth, **options).temporary_bytes for depth in (2, 8)}
    slope = (at[8] - at[2]) / 6
    assert slope == pytest.approx(kept_bytes(count, **options), rel=0.02)
    if count == 1:
        assert slope <= 1.05 * (2 * T * D + 4 * T * K * F)


@pytest.mark.parametrize("exchange", ["all_gather", "ragged"])
def test_the_other_exchanges_compile_for_gpus(exchange):
    """Rows go there and back, forward and backward, by the exchange's own collectives; nothing else carries rows."""
    compiled = program(8, exchange=exchange)
    moved = {name.split()[0] for name in compiled.collectives(at_least=2**24)}
    assert (
        moved == {"all_gather": {"all-gather", "reduce-scatter"}, "ragged": {"ragged-all-to-all"}}[exchange]
    )
    assert compiled.loops_with_collectives == 2
    assert compiled.dot_flops == [ROUTER_FLOPS] * len(compiled.dot_flops), "no dense fallback"


def test_rows_are_sent_again_or_not():
    rows = 8 * bucket(CAPACITY_FACTOR, T, E // 8)
    exchanges = {
        received: program(8, depth=4, received=received).collectives(at_least=2**26)[
            f"all-to-all bf16[{rows},{D}]"
        ]
        for received in ("keep", "resend")
    }
    assert exchanges == {"keep": 4, "resend": 5}
