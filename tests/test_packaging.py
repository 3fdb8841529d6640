"""The packages are whole: declared, found, shipped."""

import ast
import pathlib
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement

from moejax_cli import NEEDED

pytestmark = pytest.mark.repo

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = ("moejax", "custom_ops", "train", "configs", "moejax_cli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where a distribution is not called as what it lets you import.
DISTRIBUTIONS = {"yaml": "pyyaml", "orbax": "orbax-checkpoint"}


def package_files(suffix=""):
    for package in PACKAGES:
        for path in (ROOT / package).rglob(f"*{suffix}"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT)


def test_every_folder_of_code_is_a_package():
    for path in package_files(".py"):
        assert (ROOT / path.parent / "__init__.py").is_file(), f"{path} would not be in the wheel"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_python_gets_one_pair_of_jax_and_flax(python):
    environment = {"python_version": python}
    given = [Requirement(text) for text in PROJECT["dependencies"]]
    chosen = [r for r in given if r.marker is None or r.marker.evaluate(environment)]
    by_name = {requirement.name: requirement.specifier for requirement in chosen}
    assert len(by_name) == len(chosen)
    old = python == "3.11"
    for name, version in (("jax", "0.10.2"), ("jaxlib", "0.10.2"), ("flax", "0.12.8")):
        assert by_name[name].contains(version) == old, name
    for name, version in (("jax", "0.12.0"), ("jaxlib", "0.12.0"), ("flax", "0.12.9")):
        assert by_name[name].contains(version) != old, name


def test_what_the_code_imports_is_declared():
    declared = {Requirement(text).name.lower() for text in PROJECT["dependencies"]}
    declared |= {Requirement(text).name.lower() for text in PROJECT["optional-dependencies"]["hf"]}
    used = set()
    for path in package_files(".py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [str(node.module)]
            for module in {module.partition(".")[0] for module in modules}:
                if module not in sys.stdlib_module_names and module not in PACKAGES:
                    assert DISTRIBUTIONS.get(module, module).lower() in declared, f"{path} imports {module}"
                    used.add(module)
    assert set(NEEDED) == used - {"safetensors"} | {"jaxlib"}


def test_extras_are_those_promised():
    assert set(PROJECT["optional-dependencies"]) >= {"cuda13", "test", "hf", "notebook"}
    assert PROJECT["scripts"] == {"moejax": "moejax_cli:main"}
    assert PROJECT["requires-python"] == ">=3.11"


@pytest.mark.slow
def test_the_wheel_holds_every_package_and_nothing_else(tmp_path):
    line = [sys.executable, "-m", "pip", "wheel", "-q", str(ROOT), "--no-deps", "-w", str(tmp_path)]
    subprocess.run(line, check=True)
    (wheel,) = tmp_path.glob("moejax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "moejax = moejax_cli:main" in archive.read(entry_points).decode()
    wanted = {str(path) for suffix in (".py", "py.typed") for path in package_files(suffix)}
    assert wanted <= shipped, wanted - shipped
    assert {name.partition("/")[0] for name in shipped} <= set(PACKAGES)
