"""A SHA-256 per file of a finished directory, so that damage is found before anything is restored.

Orbax restores flipped bits without noticing. The manifest has the format of `sha256sum`: inside the
directory, `sha256sum -c manifest.sha256` checks it by hand.
"""

from __future__ import annotations

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.sha256"
_THREADS = 8  # hashlib releases the interpreter lock; more threads than this wait for the disk


def hash_lines(directory: Path, process: int = 0) -> str:
    """The manifest's lines of the files below `directory` that this process has written."""
    names = [name for name in _files(directory) if writer_of(name) == process]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(directory / name), names))
    return "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))


def write_manifest(directory: Path, lines: str) -> None:
    """Write the manifest of what `hash_lines` gave in all processes; it is on the disk when this returns."""
    write_durably(directory / MANIFEST, lines)


def writer_of(name: str) -> int:
    """The process that has written a file of a checkpoint: the one that Orbax names in the path, or process 0."""
    match = re.search(r"(?:^|[/.])process_(\d+)(?:/|$)", name)
    return int(match[1]) if match else 0


def find_fault(directory: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a directory that has a manifest, or None when it is sound.

    Args:
      directory: that of a manifest.
      share: (index, count): hash only every count-th file, so that processes can divide the reading. Missing
        and additional files are always found.

    Returns:
      One clause that names the bad file, such as `state/d/3fa1 differs from its hash`.
    """
    try:
        # Undecodable bytes become a replacement character; what they stand in then matches nothing.
        lines = (directory / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    digests = {line[66:]: line[:64] for line in lines}  # 64 hexadecimal digits, two spaces, the name
    if "" in digests or not digests:
        return f"{MANIFEST} is cut off"
    present = _files(directory)
    for name in sorted(digests.keys() - set(present)):
        return f"{name} is missing"
    for name in sorted(set(present) - digests.keys()):
        return f"{name} is not in {MANIFEST}"
    index, count = share
    names = present[index::count]
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = pool.map(lambda name: _file_fault(directory, name, digests[name]), names)
        return next((fault for fault in faults if fault), None)


def write_durably(path: Path, text: str) -> None:
    """Write a small file and wait until the disk has it."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Wait until the disk has the names in `directory`."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(directory: Path) -> list[str]:
    """Relative names of all files but the manifest, sorted."""
    return sorted(
        name
        for path in directory.rglob("*")
        if path.is_file() and (name := path.relative_to(directory).as_posix()) != MANIFEST
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_fault(directory: Path, name: str, digest: str) -> str | None:
    try:
        return None if _digest(directory / name) == digest else f"{name} differs from its hash"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
