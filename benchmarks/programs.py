"""What expert parallelism consists of on 8 and on 64 H200s, read from programs compiled without them.

    python -m benchmarks.programs

needs what `tests/compile_gpu` needs; nothing runs. One SwiGLU layer of the size below, forward and backward in bf16, by
itself and in a scan over layers, compiled as the trainer does. The wire's bytes are those that one device sends to
others in its first pass; further rounds, which balanced load does not need, are left out.
"""

from __future__ import annotations

import re

from benchmarks import environment
from tests.compile_gpu.moe_program import compile_moe
from tests.compile_gpu.test_expert_parallel import CHUNKS, SIZES, kept_bytes, received_rows

T, D, F, E, K = SIZES


def exchange_row(name: str, *, nodes: int, **options) -> list[object]:
    """One line of the table of exchanges."""
    program = compile_moe(SIZES, count=8 * nodes, nodes=nodes, chunks=CHUNKS, **options)
    levels = received_rows(nodes)
    exchanges = [e for rows in levels for e in program.exchanges(rows)]
    of_rows = [e for e in exchanges if e.shape.endswith(f",{D}]")]
    sent = [4 * CHUNKS * 2 * D * rows * 7 / 8 for rows in levels]
    small = [CHUNKS * (2 * 4 * 2 * K + K) * rows * 7 / 8 for rows in levels]
    sums = sum(n for kind, n in program.collectives(at_least=0).items() if re.match("all-reduce", kind))
    return [
        name,
        " + ".join(f"{size / 1e9:.2f}" for size in sent),
        f"{100 * sum(small) / sum(sent):.1f} %",
        len(of_rows),
        sum(e.products > 0 for e in of_rows),
        sum(e.work > 0 for e in of_rows),
        len(exchanges) - len(of_rows),
        sums,
        program.loops_with_collectives,
        f"{program.temporary_bytes / 2**30:.2f}",
    ]


def memory_row(count: int, received: str) -> list[object]:
    """One line of the table of what a layer keeps."""
    low, high = (
        compile_moe(SIZES, count=count, depth=depth, received=received).temporary_bytes for depth in (2, 8)
    )
    slope, formula = (high - low) / 6, kept_bytes(count, received)
    name = "1 H200" if count == 1 else f'{count} H200s, received = "{received}"'
    return [name, f"{slope / 2**20:.1f}", f"{formula / 2**20:.1f}", f"{slope / formula:.3f}"]


def main() -> None:
    """Write results/programs_h200.md."""
    header = [
        "program",
        "GB of rows sent, by level",
        "beside them",
        "exchanges of rows",
        "with a product under way",
    ]
    header += [
        "with any work",
        "small exchanges",
        "all-reduces",
        "loops with collectives",
        "temporaries, GiB",
    ]
    rows = [
        exchange_row("one layer, 1 x 8", nodes=1),
        exchange_row("4 layers in a scan, 1 x 8", nodes=1, depth=4),
        exchange_row("one layer, 8 x 8", nodes=8),
        exchange_row("4 layers in a scan, 8 x 8", nodes=8, depth=4),
    ]
    exchanges = environment.table(header, rows)
    memory = environment.table(
        ["one layer in a scan, chunks = 1", "MiB kept, measured", "formula", "ratio"],
        [memory_row(1, "keep"), memory_row(8, "keep"), memory_row(8, "resend")],
    )
    sizes = f"T={T} per device, D={D}, F={F}, E={E}, K={K}, bf16, chunks={CHUNKS}"
    environment.save("programs_h200", f"Programs for H200s: {sizes}", f"{exchanges}\n\n{memory}")


if __name__ == "__main__":
    main()
