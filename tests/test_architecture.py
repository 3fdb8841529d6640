"""What holds for all files: imports point one way, no file names a machine, README commands are literal."""

import ast
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from train.commands import COMMANDS

pytestmark = pytest.mark.repo

ROOT = pathlib.Path(__file__).resolve().parent.parent
# From the bottom up: a package imports itself and what stands before it.
ROOMS = ("custom_ops", "moejax", "train", "configs", "moejax_cli")
TEXT = {".py", ".md", ".toml", ".yaml", ".yml", ".cfg", ".txt", ".sh", ".ipynb", ".cc", ".cu", ".h"}


def project_files():
    """Text files of the project; hidden folders but `.ci`, and what a build or a run leaves, are not it."""
    left = {"build", "dist", "runs"}
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part != ".ci" for part in parts)
        made = parts[0] in left or any(
            part.startswith("venv") or part.endswith(".egg-info") for part in parts
        )
        if not hidden and not made and path.is_file() and (path.suffix in TEXT or parts[0] == ".ci"):
            yield path


def imported_packages(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room):
    forbidden = {*ROOMS[ROOMS.index(room) + 1 :], "tests", "benchmarks"}
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        upward = forbidden & set(imported_packages(path.read_text()))
        assert not upward, f"{path.relative_to(ROOT)} imports {', '.join(sorted(upward))}"


def test_an_import_that_points_up_would_be_seen():
    source = "def f():\n    from train.config import TrainConfig\n    import configs.quickstart as q, jax\n"
    assert set(imported_packages(source)) == {"train", "configs", "jax"}


def test_no_file_names_a_machine_or_a_package_host():
    folders = "|".join(("root", "work", "home", "Users"))
    pattern = re.compile(
        rf"(?<![\w.*)}}]){'/'}({folders})/|--(extra-)?index" + "-url|files.pythonhosted" + r"\.org"
    )
    assert pattern.search("see " + "/ro" + "ot/x") and not pattern.search("a/work/b")
    for path in project_files():
        found = pattern.search(path.read_text(errors="replace"))
        assert not found, f"{path.relative_to(ROOT)} names {found and found[0]}"


def test_no_file_puts_work_off():
    words = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    for path in project_files():
        assert not words.search(path.read_text(errors="replace")), path.relative_to(ROOT)


def readme_blocks():
    return re.findall(r"^```\w*\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


def test_readmes_two_commands_are_one_literal_line_each():
    run, test = readme_blocks()[:2]
    for block in (run, test):
        assert block.count("\n") == 1 and block.startswith("python3 -m venv .venv && ")
        assert not re.search(r"[<>$\\…]", block), "a placeholder or a continued line"
    steps = "moejax train configs/quickstart.py", "moejax eval ", "moejax generate "
    assert all(f".venv/bin/{step}" in run for step in steps)
    assert test.strip().endswith("-m pytest -n 2 --dist worksteal")


def test_readmes_commands_and_configs_exist():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(
        r"\bmoejax (train|[a-z]+) ?([^`|\n]*)", "\n".join([*readme_blocks(), *readme.split("`")[1::2]])
    )
    assert len(commands) > 5
    for command, rest in commands:
        assert command in COMMANDS, command
        argument = shlex.split(rest.partition("&&")[0])[:1]
        if command == "train" and argument != ["CONFIG"] and argument:
            name = argument[0].removeprefix("configs/").removesuffix(".py")
            assert (ROOT / "configs" / f"{name}.py").is_file(), argument


def chosen_tests():
    """What texts and scripts let pytest run, where they name files: its arguments, as the shell gives them."""
    # Read when tests are collected, also by other Pythons' runs of a copy that has no scripts.
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob(".ci/steps.sh")):
        for line in re.findall(r"-m pytest ([^`\n]*)", path.read_text().replace("\\\n", "")):
            words = shlex.split(line.replace("${@:-tests/compile_gpu}", "tests/compile_gpu"))
            if any(word.startswith("tests/") for word in words):
                parts = (re.fullmatch(r"(.*){(.*)}(.*)", word) for word in words)
                yield tuple(
                    given
                    for word, part in zip(words, parts, strict=True)
                    for given in (
                        [part[1] + name + part[3] for name in part[2].split(",")] if part else [word]
                    )
                )


@pytest.mark.landing
@pytest.mark.parametrize("words", sorted(set(chosen_tests())), ids=" ".join)
def test_a_command_that_names_tests_runs_some(words):
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *words, "-n", "0"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_links_in_the_documents_lead_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for path in documents:
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
            if not link.startswith("https://"):
                assert (path.parent / link).exists(), f"{path.relative_to(ROOT)}: {link}"
