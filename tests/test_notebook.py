"""The notebook of examples/: it runs from the first to the last cell, and its committed outputs are small."""

import base64
import os

import nbformat
import pytest
from helpers import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "dclr.ipynb"
SHORT = "EPOCHS, TRAIN_PER_CLASS, TEST_PER_CLASS = 20, 4, 1"
"""32 training videos, which are one batch: 20 steps, 16 of which only fill the queue."""


def test_the_committed_notebook_is_small_and_was_run_without_errors():
    assert NOTEBOOK.stat().st_size < 400_000
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert len(pictures(cells)) == 6


@pytest.mark.slow
def test_every_cell_runs(tmp_path, monkeypatch, clean_environment):
    from nbclient import NotebookClient

    for name in os.environ.keys() - clean_environment.keys():  # the notebook's run must not join that of another test
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"\n{SHORT}"
    notebook.metadata.kernelspec.name = "python3"
    NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(pictures(cells)) == 6
    assert (tmp_path / "runs" / "notebook" / "backbone.safetensors").is_file()


def pictures(cells: list[nbformat.NotebookNode]) -> list[bytes]:
    """Return the pictures that cells show, as JPEG files."""
    shown = [output.get("data", {}) for cell in cells for output in cell.outputs]
    return [base64.b64decode(data["image/jpeg"]) for data in shown if "image/jpeg" in data]
