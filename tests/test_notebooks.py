"""The notebooks run from top to bottom, with the public interface only."""

import ast
import pathlib

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
pytestmark = pytest.mark.repo


def code_of(path):
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    return notebook, [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    NOTEBOOKS,
    ids=lambda path: path.stem,
)
def test_a_notebook_runs(path):
    nbclient = pytest.importorskip("nbclient", reason="needs the extra `notebook`")
    notebook, _ = code_of(path)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    printed = [
        out
        for cell in notebook.cells
        for out in cell.get("outputs", [])
        if "image/png" in out.get("data", {})
    ]
    assert printed, "it shows a picture"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_uses_the_public_interface(path):
    pytest.importorskip("nbformat", reason="needs the extra `notebook`")
    notebook, sources = code_of(path)
    for node in ast.walk(ast.parse("\n".join(sources))):
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith("_") or node.attr.endswith("__"), node.attr
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.module.startswith(("moejax.", "train.", "custom_ops")), node.module
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
