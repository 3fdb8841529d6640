"""A plain installation, as of a wheel, in a folder whose files have the names of moejax's packages."""

import importlib
import os
import pathlib
import shutil
import subprocess
import sysconfig
import venv

import pytest

from moejax_cli import PACKAGES

SCRIPT = "import sys\nfrom moejax_cli import main\nsys.exit(main())\n"  # as pip writes it


@pytest.fixture(scope="module")
def moejax(tmp_path_factory):
    """The command `moejax` of a virtual environment without the hook of an editable installation."""
    folder = tmp_path_factory.mktemp("plain") / "venv"
    venv.create(folder, symlinks=True)
    packages = pathlib.Path(
        sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    )
    for name in (*PACKAGES, "moejax_cli"):
        for part in importlib.import_module(name).__path__:
            ignored = shutil.ignore_patterns("__pycache__", "csrc")
            shutil.copytree(part, packages / name, ignore=ignored, dirs_exist_ok=True)
    # What stands in this file is searched, but .pth files in those folders are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    script = folder / "bin" / "moejax"
    script.write_text(SCRIPT)
    return [folder / "bin" / "python", script]


@pytest.fixture
def folder(tmp_path):
    """A user's project: none of its files may run in place of ours."""
    for name in (
        "train.py",
        "moejax.py",
        "configs/__init__.py",
        "configs/quickstart.py",
        "custom_ops/__init__.py",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("import pathlib\npathlib.Path('ran').touch()\nprint('the user\\'s', __name__)\n")
    return tmp_path


def searching(searched):
    """The environment with this PYTHONPATH, or none."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | ({"PYTHONPATH": searched} if searched else {})


@pytest.mark.parametrize(
    ("searched", "config", "message"),
    [
        (None, "nosuchconfig", "CONFIG = nosuchconfig: no such config file"),
        # Refused only after all packages have been imported.
        (".", "quickstart", "mesh.expert = 3: must divide the number of devices (1): 1"),
    ],
)
def test_files_of_the_current_folder_do_not_run(moejax, folder, searched, config, message):
    environment = searching(searched)
    line = [*moejax, "launch", "--processes", "1", "--devices-per-process", "1"]
    line += ["train", config, "--mesh.expert", "3", "--workdir", "run"]
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1
    assert not (folder / "ran").exists() and not (folder / "run").exists()


@pytest.mark.parametrize("name", ["jax", "yaml"])
def test_a_file_in_place_of_a_package_that_moejax_needs_is_named(moejax, tmp_path, name):
    (tmp_path / f"{name}.py").write_text("")
    command = dict(cwd=tmp_path, capture_output=True, text=True, timeout=120)
    done = subprocess.run([*moejax, "doctor"], env=searching(f"{os.sep}:."), **command)
    assert (done.returncode, done.stdout) == (2, ""), done
    assert done.stderr == (
        f"error: PYTHONPATH = /:.: {tmp_path / name}.py would be imported as {name}; "
        "take its folder out of PYTHONPATH or rename it\n"
    )
    done = subprocess.run([*moejax, "train", "nosuchconfig"], env=searching(None), **command)
    assert "CONFIG = nosuchconfig: no such config file" in done.stderr, (
        "without PYTHONPATH nothing is in the way"
    )
