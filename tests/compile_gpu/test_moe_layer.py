"""One MoE layer, forward and backward, in bf16: its kernels, its collectives and its memory.

Shapes: T tokens of one device, D model width, F expert hidden width, E experts, K experts per token.
"""

import functools

import pytest

from tests.compile_gpu.h200 import Program
from tests.compile_gpu.moe_program import Sizes, compile_moe

pytestmark = pytest.mark.compile_gpu

T, D, F, E, K = 4096, 2048, 1024, 64, 8
ROUTER_FLOPS = 2 * T * D * E


@functools.cache
def layer_on(count: int) -> Program:
    return compile_moe(Sizes(T, D, F, E, K), count=count)


# Grouped products: 2 forward, and of each the gradients of both operands. Tails: one behind each row-wise product, two
# before each gradient of weights, whose groups are also guarded against each other's NaN. Every level moves rows out
# and in, forward and backward; a wire level also its small message. (In a program of one layer XLA shares the experts'
# input rows between forward and backward.) On several GPUs the loops of further rounds hold all of it once more, the
# forward pass again in backward's loop.
CALLS = {
    1: {
        "mosaic_gpu_v2": 6,
        "zero_tail_kernel": 8,
        "clean_kernel": 4,
        "spoil_kernel": 2,
        "moejax_make_plan": 1,
        "moejax_permute": 2,
        "moejax_unpermute": 2,
    },
    8: {
        "mosaic_gpu_v2": 13,
        "zero_tail_kernel": 17,
        "clean_kernel": 8,
        "spoil_kernel": 4,
        "moejax_make_plan": 6,
        "moejax_permute": 13,
        "moejax_unpermute": 13,
    },
}
# A token's K choices fall on 8 (1 - C(56, 8) / C(64, 8)) = 5.43 devices on average; buckets hold 1.15 times as many
# rows, in tiles of 8, those of further rounds a quarter.
BUCKET, RETRY_BUCKET = 3200, 800


@pytest.mark.parametrize("count", [1, 8])
def test_experts_are_kernels_and_nothing_else_is_multiplied(count):
    program = layer_on(count)
    assert program.custom_calls == CALLS[count]
    # The router's product, and the gradients of its two operands: no dense fallback, not of one expert.
    assert program.dot_flops == [ROUTER_FLOPS] * 3


def test_one_gpu_communicates_nothing():
    assert not layer_on(1).collectives(at_least=0)


def test_collectives_on_eight_gpus():
    """Rows travel forth and back in forward and in backward; choices and weights in a small message beside them."""
    program = layer_on(8)
    assert program.collectives(at_least=2**20) == {
        f"all-to-all bf16[{8 * BUCKET},{D}]": 4,
        f"all-to-all f32[{8 * BUCKET},{2 * K}]": 2,
        # Further rounds: forward 2, in backward forth again and the gradients both ways.
        f"all-to-all bf16[{8 * RETRY_BUCKET},{D}]": 5,
    }
    # The router's gradient, the losses, the load, whether another round is needed; the messages of further rounds.
    small = program.collectives(at_least=0) - program.collectives(at_least=2**20)
    messages = {name: n for name, n in small.items() if name.startswith("all-to-all")}
    assert messages == {
        f"all-to-all f32[{8 * RETRY_BUCKET},{2 * K}]": 3,  # as above, with the weights' gradients
        f"all-to-all s8[{8 * BUCKET},{K}]": 1,  # which choices were carried out
        f"all-to-all s8[{8 * RETRY_BUCKET},{K}]": 2,
    }
    assert {name.split()[0] for name in small} == {"all-reduce", "all-to-all"}


def test_memory_on_one_gpu():
    """Temporaries: the weights in bf16, the layer's input and the pre-activation."""
    weights = 3 * E * D * F * 2
    assert layer_on(1).temporary_bytes <= weights + 2 * T * D + 4 * T * K * F


def test_memory_on_eight_gpus():
    """Temporaries: six buffers of the experts' rows, which are 1.15 times as many as balanced choices fill."""
    assert layer_on(8).temporary_bytes <= 6 * 1.15 * T * K * D * 2
