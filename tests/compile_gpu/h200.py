"""H200 GPUs to compile for, and what a compiled program says about itself."""

import collections
import contextlib
import functools
import importlib.util
import math
import os
import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass

import jax
import pytest

# What the compiler asks of a device (NVIDIA H200 SXM: data sheet and CUDA's device properties for 9.0).
TARGET = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 4800000000000
  device_memory_size: 150754820096
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H200"
"""
ITEM_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "s32": 4,
    "u32": 4,
    "s64": 8,
    "f32": 4,
    "f64": 8,
    "bf16": 2,
    "f16": 2,
}
COLLECTIVES = (
    "all-to-all",
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "ragged-all-to-all",
)
# How the kernels of grouped products are called.
PRODUCTS = ("mosaic_gpu_v2", "rowwise_kernel", "drhs_kernel")


def devices(count: int, nodes: int = 1) -> list[jax.Device]:
    """That many H200s, spread evenly over so many nodes, for compiling only."""
    from jax.experimental import topologies

    # The plugin would refuse to load beside libraries that it only needs for running.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    # XLA collects stack traces as it compiles, and to look their symbols up takes minutes.
    os.environ["LLVM_DISABLE_SYMBOLIZATION"] = "1"
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h200", target_config=TARGET, topology=f"1x{nodes}x{count // nodes}"
    ).devices


@contextlib.contextmanager
def tracing_for(device: jax.Device):
    """Trace and lower as on a machine with such a GPU; one of jax's kernels asks `jax.devices()` for its cores."""
    with pytest.MonkeyPatch.context() as patch, jax.default_device(device):
        patch.setattr(jax, "devices", lambda *_: [device])
        yield


@dataclass(frozen=True)
class Exchange:
    """One all-to-all of a scheduled program, from its start to where its result is needed.

    Fields:
      shape: of its result, as `bf16[64,128]`.
      products: kernels of grouped products in between.
      work: these and all other kernels whose result has at least 1 MiB.
    """

    shape: str
    products: int
    work: int


@dataclass(frozen=True)
class Program:
    """A program as traced (StableHLO) and as compiled (scheduled HLO), and the memory that it takes on one GPU."""

    traced: str
    compiled: str
    argument_bytes: int
    output_bytes: int
    temporary_bytes: int

    @property
    def custom_calls(self) -> collections.Counter[str]:
        """How often each kernel of ours or jax's is called: Triton's by their own names, others by target.

        XLA's own dense products, which may be calls of cuBLAS too, are in `dot_flops`.
        """
        names: list[str] = []
        for line in self.compiled.splitlines():
            target = re.search(r'custom_call_target="([^"]+)"', line)
            if target and target[1] == "__gpu$xla.gpu.triton":
                names.append(re.findall(r' name = "(\w+)"', line)[0])
            elif target and not target[1].startswith("__cublas"):
                names.append(target[1])
        return collections.Counter(names)

    @functools.cached_property
    def computations(self) -> dict[str, list[str]]:
        """The lines of each computation, in the order of execution where it is scheduled."""
        found: dict[str, list[str]] = {}
        lines: list[str] = []
        for line in self.compiled.splitlines():
            if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
                lines = found[head[1]] = []
            else:
                lines.append(line)
        return found

    def exchanges(self, rows: int) -> list[Exchange]:
        """The asynchronous all-to-alls whose result has so many rows, computation by computation."""
        found = []
        for lines in self.computations.values():
            starts = {}
            for number, line in enumerate(lines):
                if start := re.match(r"\s*%([\w.\-]+) = .* all-to-all-start\(", line):
                    starts[start[1]] = number
                done = re.search(rf" = (\w+\[{rows},\d+\])\S* all-to-all-done\(%([\w.\-]+)\)", line)
                if done:
                    between = [
                        kernel for kernel in map(_kernel, lines[starts[done[2]] + 1 : number]) if kernel
                    ]
                    products = sum(name in PRODUCTS for name, _ in between)
                    work = sum(name in PRODUCTS or size >= 2**20 for name, size in between)
                    found.append(Exchange(done[1], products, work))
        return found

    @functools.cached_property
    def loops_with_collectives(self) -> int:
        """How many loops have collectives in their body that are in no loop inside of it."""
        bodies = re.findall(r" while\(.*body=%?([\w.\-]+)", self.compiled)
        pattern = rf" ({'|'.join(COLLECTIVES)})(-start)?\("
        return sum(any(re.search(pattern, line) for line in self.computations[body]) for body in bodies)

    def collectives(self, at_least: int) -> collections.Counter[str]:
        """The collectives whose result has at least so many bytes, as `all-to-all bf16[64,128]`."""
        found: collections.Counter[str] = collections.Counter()
        kinds = "|".join(COLLECTIVES)
        for shape, kind in re.findall(rf" = (\S+) ({kinds})(?:-done)?\(", self.compiled):
            dtype, sizes = re.match(r"(\w+)\[([\d,]*)\]", shape).groups()
            size = math.prod(int(n) for n in sizes.split(",") if n)
            if size * ITEM_BYTES[dtype] >= at_least:
                found[f"{kind} {dtype}[{sizes}]"] += 1
        return found

    @property
    def dot_flops(self) -> list[int]:
        """FLOPs of every product that is no kernel of ours, as traced."""
        pattern = (
            r"stablehlo\.dot_general .*?contracting_dims = \[([\d, ]*)\]"
            r".*: \(tensor<([\dx]+)x\w+>, .* -> tensor<([\dx]*)"
        )
        found = []
        for contracted, lhs, result in re.findall(pattern, self.traced):
            sizes = [int(n) for n in lhs.split("x")]
            summed = math.prod(sizes[int(axis)] for axis in contracted.split(",") if axis.strip())
            found.append(2 * summed * math.prod(int(n) for n in result.split("x") if n))
        return found


def _kernel(line: str) -> tuple[str, int] | None:
    """Name of what an instruction launches, and bytes of its result; None if it launches nothing of ours or XLA's."""
    found = re.match(r"\s*%[\w.\-]+ = (\(.*?\)|\S+) (fusion|custom-call)\(", line)
    if not found:
        return None
    name = found[2]
    if target := re.search(r'custom_call_target="([^"]+)"', line):
        name = target[1]
        if name == "__gpu$xla.gpu.triton":
            name = re.findall(r' name = "(\w+)"', line)[0]
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", found[1])
    size = sum(
        ITEM_BYTES.get(dtype, 1) * math.prod(int(n) for n in sizes.split(",") if n) for dtype, sizes in arrays
    )
    return name, size


def compile_for(device: jax.Device, function, *arguments, dump: pathlib.Path | None = None) -> Program:
    """Trace, lower and compile a jitted function for the device and those beside it in the arguments' shardings.

    Args:
      dump: folder for the PTX of all kernels but Mosaic's.
    """
    # The suite's flags forbid optimising, which is for CPU programs that run once. From jax 0.11 on XLA finds no tiles
    # for dense products by Triton where it cannot time them.
    options: dict[str, int | str] = {"xla_backend_optimization_level": 3, "xla_gpu_enable_triton_gemm": False}
    if dump is not None:
        options["xla_dump_to"] = str(dump)
        if jax.__version_info__ >= (0, 11):
            options["xla_dump_emitter_re"] = ".*"
    with tracing_for(device):
        lowered = function.lower(*arguments)
        compiled = lowered.compile(compiler_options=options)
    memory = compiled.memory_analysis()
    return Program(
        traced=lowered.as_text(),
        compiled=compiled.as_text(),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
    )


def kernels(folder: pathlib.Path, *names: str) -> dict[str, str]:
    """The PTX of the named Triton kernels, from a folder given to `compile_for` as `dump`."""
    found = {}
    for path in folder.glob("*.ptx"):
        text = path.read_text()
        found.update({name: text for name in names if re.search(rf"\.entry {name}\b", text)})
    assert set(found) == set(names), found.keys()
    return found


def assemble(ptx: str) -> str:
    """What ptxas, one of the wheels, says about registers and spills."""
    (root,) = importlib.util.find_spec("nvidia").submodule_search_locations
    ptxas = next(pathlib.Path(root).rglob("bin/ptxas"))
    with tempfile.TemporaryDirectory() as folder:
        source = pathlib.Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", "--gpu-name", "sm_90a", source, "-o", os.devnull]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def spilled_bytes(report: str) -> list[int]:
    """Bytes that each kernel of an assembler's report keeps in memory because it ran out of registers."""
    return [int(stores) for stores in re.findall(r"(\d+) bytes spill stores", report)]
