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

from train.errors import one_line
from train.reading import regular
from train.strays import is_stray

MANIFEST = "manifest.sha256"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_LONGEST = 200  # characters of a name in an error: that of a damaged manifest may have any length
_THREADS = 8  # hashlib releases the interpreter lock; more threads than this wait for the disk


def hash_lines(directory: Path, process: int = 0) -> str:
    """The manifest's lines of the files below `directory` that this process has written."""
    names = [name for name in _own_files(directory) if writer_of(name) == process]
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(lambda name: _digest(directory / name), names))
    return "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))


def write_manifest(directory: Path, lines: str) -> None:
    """Write the manifest of what `hash_lines` gave in all processes; it is on the disk when this returns.

    Its last line is a comment with the number of files: without it, nobody would miss the end of a manifest.
    """
    write_durably(directory / MANIFEST, lines + _closing(lines.count("\n")))


def writer_of(name: str) -> int:
    """The process that has written a file of a checkpoint: the one that Orbax names in the path, or process 0."""
    match = re.search(r"(?:^|[/.])process_(\d+)(?:/|$)", name)
    return int(match[1]) if match else 0


def find_fault(directory: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a directory that has a manifest, or None when it is sound.

    Every file of the manifest must be there and have its hash. Other files do no harm, see `find_strays`.

    Args:
      directory: that of a manifest.
      share: (index, count): hash only every count-th file, so that processes can divide the reading. Missing
        files are always found.

    Returns:
      One clause that names the bad file, such as `state/d/3fa1 differs from its hash`.
    """
    try:
        digests, is_closed = _read_manifest(directory)
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except ValueError:
        return f"{MANIFEST} is cut off"
    for name in sorted(digests):
        if not os.path.isfile(directory / name):
            return f"{one_line(name, _LONGEST)} is missing"
    if not is_closed and (unlisted := set(_own_files(directory)) - digests.keys()):
        return f"{min(unlisted)} is not in {MANIFEST}"
    index, count = share
    names = sorted(digests)[index::count]
    with ThreadPoolExecutor(_THREADS) as pool:
        faults = pool.map(lambda name: _file_fault(directory, name, digests[name]), names)
        return next((fault for fault in faults if fault), None)


def has_its_hash(directory: Path, name: str) -> bool:
    """Whether one file of a directory is what the manifest says of it."""
    try:
        digests, _ = _read_manifest(directory)
    except (OSError, ValueError):
        return False
    return name in digests and _file_fault(directory, name, digests[name]) is None


def find_strays(directory: Path) -> list[str]:
    """Files below `directory` that are not in its manifest: other programs have left them. None without a manifest."""
    try:
        digests, _ = _read_manifest(directory)
    except (OSError, ValueError):
        return []
    return sorted(set(_files(directory)) - digests.keys())


def _closing(count: int) -> str:
    return f"# {count} files\n"  # `sha256sum -c` passes over it


def _read_manifest(directory: Path) -> tuple[dict[str, str], bool]:
    """Name → hash, and whether the line with the number of files is there: manifests of older versions have none.

    Raises:
      OSError: it cannot be read.
      ValueError: it is no whole manifest.
    """
    # Undecodable bytes become a replacement character; what they are part of then matches nothing.
    text = Path(regular(directory / MANIFEST)).read_bytes().decode("utf-8", "replace")
    *lines, end = text.split("\n")
    matches = [_LINE.fullmatch(line) for line in lines if not line.startswith("#")]
    digests = {match[2]: match[1] for match in matches if match}
    comments = [line for line in lines if line.startswith("#")]
    is_closed = bool(comments)
    if end or not digests or None in matches or (is_closed and lines[-1] + "\n" != _closing(len(digests))):
        raise ValueError
    return digests, is_closed


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


def _own_files(directory: Path) -> list[str]:
    """Those of `_files` that no other program is known to leave."""
    return [name for name in _files(directory) if not any(map(is_stray, name.split("/")))]


def _files(directory: Path) -> list[str]:
    """Relative names of all files but the manifest, sorted; what vanishes meanwhile is left out."""
    names = [Path(folder, name) for folder, _, found in os.walk(directory) for name in found]
    relative = (path.relative_to(directory).as_posix() for path in names if os.path.isfile(path))
    return sorted(name for name in relative if name != MANIFEST)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_fault(directory: Path, name: str, digest: str) -> str | None:
    try:
        return None if _digest(directory / name) == digest else f"{name} differs from its hash"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
