"""The command line: see the package."""

import argparse
import sys
import time
from pathlib import Path

from tests.fuzz.readers import READERS
from tests.fuzz.run import damaged, fuzz, worker


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--reader", choices=READERS, help="unset: all of them")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--write", type=Path, help="write the first input to this file and do nothing else")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.worker:
        name, first, last = chosen.worker
        worker(name, int(first), int(last))
        return 0
    if chosen.write:
        chosen.write.write_bytes(damaged(chosen.reader, chosen.first))
        return 0
    findings = 0
    for name in [chosen.reader] if chosen.reader else READERS:
        began = time.monotonic()
        outcome = fuzz(name, chosen.inputs, chosen.first)
        seconds = time.monotonic() - began
        print(
            f"{name}: {chosen.inputs} inputs, {outcome.read} read, {outcome.refused} refused in one line, "
            f"{len(outcome.findings)} findings, {seconds:.0f} s",
            flush=True,
        )
        for number, what in list(outcome.findings.items())[:20]:
            print(f"  input {number}: {what}", flush=True)
        findings += len(outcome.findings)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
