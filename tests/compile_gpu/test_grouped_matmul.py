"""The grouped products' kernels: that they compile for every type and size, need no memory and spill nothing."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from custom_ops import grouped_matmul
from tests.compile_gpu.h200 import assemble, compile_for, kernels, spilled_bytes

pytestmark = pytest.mark.compile_gpu

LARGE = (65536, 2048, 1408, 64)
ODD = (1000, 100, 37, 5)


def gradients(implementation, rows, w, sizes):
    """All three products."""

    def loss(rows, w):
        return jnp.sum(jnp.sin(grouped_matmul(rows, w, sizes, implementation=implementation)))

    return jax.value_and_grad(loss, (0, 1))(rows, w)


def operands(N, D, F, E, dtype, sharding):
    shapes = ((N, D), dtype), ((E, D, F), dtype), ((E,), jnp.int32)
    return [jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64], ids=str)
@pytest.mark.parametrize("sizes", [LARGE, ODD], ids=["large", "odd"])
def test_triton(h200s, tmp_path, dtype, sizes):
    (device,) = h200s(1)
    with jax.enable_x64(dtype == jnp.float64):
        run = jax.jit(functools.partial(gradients, "triton"))
        arguments = operands(*sizes, dtype, SingleDeviceSharding(device))
        program = compile_for(device, run, *arguments, dump=tmp_path)
    assert program.custom_calls == {"rowwise_kernel": 2, "drhs_kernel": 1}
    assert program.dot_flops == []
    N, _, F, _ = sizes
    # The product and its gradient, which the loss makes necessary, and tables of tiles.
    assert program.temporary_bytes <= 2 * N * F * jnp.dtype(dtype).itemsize + 100_000
    for ptx in kernels(tmp_path, "rowwise_kernel", "drhs_kernel").values():
        assert spilled_bytes(assemble(ptx)) == [0]


def test_triton_uses_the_units_that_it_should(h200s, tmp_path):
    """bf16 goes to Hopper's warpgroup products; f32 to true f32 arithmetic, not TF32."""
    (device,) = h200s(1)
    ptx = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        folder = tmp_path / jnp.dtype(dtype).name
        run = jax.jit(functools.partial(gradients, "triton"))
        compile_for(device, run, *operands(*LARGE, dtype, SingleDeviceSharding(device)), dump=folder)
        ptx[dtype] = kernels(folder, "rowwise_kernel", "drhs_kernel").values()
    assert all("wgmma.mma_async" in text for text in ptx[jnp.bfloat16])
    assert all("fma.rn.f32" in text and "tf32" not in text for text in ptx[jnp.float32])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=str)
def test_mosaic(h200s, capfd, monkeypatch, dtype):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    (device,) = h200s(1)
    run = jax.jit(functools.partial(gradients, "mosaic"))
    program = compile_for(device, run, *operands(*LARGE, dtype, SingleDeviceSharding(device)))
    # Each row-wise product's tail is zeroed in place, and both operands' of the weights' gradient, of which blocks of
    # several groups are rid of what is not finite.
    guard = {"zero_tail_kernel": 4, "clean_kernel": 2, "spoil_kernel": 1}
    assert program.custom_calls == {"mosaic_gpu_v2": 3} | guard
    assert program.dot_flops == []
    N, D, F, _ = LARGE
    # The product and its gradient, and the copy of the rows, still needed here, whose tail is zeroed.
    assert program.temporary_bytes <= (2 * F + D) * N * jnp.dtype(dtype).itemsize + 100_000
    printed = capfd.readouterr()
    spills = spilled_bytes(printed.out + printed.err)
    assert len(spills) == 3 and not any(spills)


@pytest.mark.parametrize("implementation", ["mosaic", "triton"])
def test_inside_shard_map_with_varying_axes_checked(h200s, implementation):
    """One matrix shared by eight devices: its gradient is summed over them outside of the kernels."""
    devices = h200s(8)
    mesh = jax.make_mesh((8,), ("data",), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
    body = jax.shard_map(
        lambda *operands: gradients(implementation, *operands)[1],
        mesh=mesh,
        in_specs=(P("data"), P(), P("data")),
        out_specs=(P("data"), P()),
    )
    N, D, F, E = 1024, 256, 384, 4
    shapes = (
        ((8 * N, D), jnp.bfloat16, P("data")),
        ((E, D, F), jnp.bfloat16, P()),
        ((8 * E,), jnp.int32, P("data")),
    )
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in shapes
    ]
    program = compile_for(devices[0], jax.jit(body), *arguments)
    name, calls = {"mosaic": ("mosaic_gpu_v2", 3), "triton": ("rowwise_kernel", 2)}[implementation]
    assert program.custom_calls[name] == calls
    assert program.collectives(at_least=E * D * F) == {f"all-reduce bf16[{E},{D},{F}]": 1}
