"""Where the command `moejax` and its worker processes begin: with moejax's own packages, whatever else is called so.

A project's folder often holds a `train.py` or a folder `configs`. With PYTHONPATH=. Python would import those in the
place of ours. The name of this package is one that no project has.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PACKAGES = ("configs", "train", "moejax", "custom_ops")
FOLDER = pathlib.Path(__file__).resolve().parent.parent
# Packages that moejax needs; all are folders, so a file of such a name is none of them.
NEEDED = "jax jaxlib flax numpy optax orbax grain tyro yaml rich tensorboardX tokenizers pyarrow matplotlib".split()


class OwnPackages(MetaPathFinder):
    """Finds moejax's packages beside this one."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of one of `PACKAGES`; None for everything else, which others find."""
        return PathFinder.find_spec(name, [str(FOLDER)], target) if name in PACKAGES else None


def file_in_the_way() -> pathlib.Path | None:
    """A file that Python would import, because of PYTHONPATH, in the place of a package that moejax needs."""
    folders = [pathlib.Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    files = (folder / f"{name}.py" for folder in folders for name in NEEDED)
    return next((file for file in files if file.is_file()), None)


def main() -> int:
    """Run the command line of this process and return its exit code."""
    if file := file_in_the_way():
        print(
            f"error: PYTHONPATH = {os.environ['PYTHONPATH']}: {file.absolute()} would be imported as {file.stem}; "
            "take its folder out of PYTHONPATH or rename it",
            file=sys.stderr,
        )
        return 2
    # Behind the finder of an editable installation, which also knows where the native ops were built.
    sys.meta_path.insert(sys.meta_path.index(PathFinder), OwnPackages)
    from train.cli import main as run

    return run()


if __name__ == "__main__":  # how `moejax launch` starts its workers
    sys.exit(main())
