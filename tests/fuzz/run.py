"""Damaged inputs one after the other, here or in a process of its own that may crash or hang."""

import contextlib
import io
import json
import logging
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.fuzz.mutate import mutate
from tests.fuzz.readers import READERS, Reader
from train.errors import ConfigError

SECONDS = 20  # of one input; a reader takes milliseconds
MEMORY = 8 << 30  # bytes of address space
TOO_MANY = 200  # findings after which a reader is left
LONGEST = 2000  # characters of an error's line


@dataclass
class Outcome:
    """How many inputs were read and refused, and the findings: input's number → what went wrong."""

    read: int = 0
    refused: int = 0
    findings: dict[int, str] = field(default_factory=dict)


def damaged(name: str, number: int) -> bytes:
    """The input with this number, always the same."""
    return mutate(random.Random(f"{name}-{number}"), _seeds(name), READERS[name].structure)


@cache
def _seeds(name: str) -> list[bytes]:
    return READERS[name].seeds()


def attempt(name: str, number: int, folder: Path) -> str:
    """`read`, `refused`, or what went wrong with one input."""
    reader = READERS[name]
    path = folder / reader.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(damaged(name, number))
    return result_of(reader, path)


def result_of(reader: Reader, path: Path) -> str:
    """`read`, `refused`, or what went wrong with one file."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            reader.read(path)
            result = "read"
        except ConfigError as error:
            line = " ".join(str(error).split())
            result = "refused" if len(line) <= LONGEST else f"a line of {len(line)} characters: {line[:200]}"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            result = f"{type(error).__name__}: {str(error)[:200]} in {where.name} ({where.filename}:{where.lineno})"
    return f"warning: {said[0].message}" if said else result


def fuzz_here(name: str, first: int, last: int, report=lambda number, result: None) -> Outcome:
    """Read inputs `first` to `last` (left out) in this process."""
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        READERS[name].prepare(Path(folder))
        for number in range(first, last):
            result = attempt(name, number, Path(folder))
            outcome.read += result == "read"
            outcome.refused += result == "refused"
            if result not in ("read", "refused"):
                outcome.findings[number] = result
            report(number, result)
    return outcome


def worker(name: str, first: int, last: int) -> None:
    """The same, with limits of time and memory; writes a line of JSON before and after each input."""
    logging.getLogger("moejax").setLevel(logging.ERROR)  # "does not look like text"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    lines = sys.stdout
    print(json.dumps([first, "begun"]), flush=True, file=lines)
    signal.alarm(SECONDS)

    def report(number: int, result: str) -> None:
        signal.alarm(SECONDS)  # its default action ends the process, whatever code is stuck
        lines.write(json.dumps([number, result]) + "\n")
        lines.flush()

    with contextlib.redirect_stdout(io.StringIO()):
        fuzz_here(name, first, last, report)


def fuzz(name: str, inputs: int, first: int = 0) -> Outcome:
    """Read `inputs` damaged files in processes of their own; one that dies is a finding, and the next goes on."""
    outcome, number, last = Outcome(), first, first + inputs
    while number < last and len(outcome.findings) < TOO_MANY:
        command = [sys.executable, "-m", "tests.fuzz", "--worker", name, str(number), str(last)]
        # What it says goes to a file: a pipe that nobody reads yet would stop it once it is full.
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                done, result = json.loads(line)
                if result == "begun":
                    continue
                number = done + 1
                outcome.read += result == "read"
                outcome.refused += result == "refused"
                if result not in ("read", "refused"):
                    outcome.findings[done] = result
            process.wait()
            errors.seek(0)
            said = errors.read().strip()
        if said and not process.returncode:
            outcome.findings.setdefault(number, f"written to stderr: {said[-300:]}")
        if number < last:
            how = (
                "hangs"
                if process.returncode == -signal.SIGALRM
                else f"the process ended with {process.returncode}"
            )
            outcome.findings[number] = f"{how}: {said[-500:]}"
            number += 1
    return outcome
