"""The notebook runs from top to bottom, and its outputs are those of such a run."""

import json
import re

import pytest

from ..common import ROOT

NOTEBOOK = ROOT / "demo/panet_d2_tutorial.ipynb"


def code_cells():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(cell):
    return "".join(
        "".join(output.get("text", [])) for output in cell["outputs"] if output.get("text")
    )


def test_committed_outputs():
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds and kinds.count("display_data") >= 4  # pictures
    text = "\n".join(map(printed, cells))
    assert not re.search(r"Warning|Traceback|/(home|root|work|tmp)/", text)
    assert float(re.search(r"segm/AP50 +([\d.]+)", text)[1]) > 40


@pytest.mark.slow
def test_runs(tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("640", "20")  # steps
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(notebook, timeout=900, resources=resources)
    client.execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 4
    assert (tmp_path / "output/notebook/model_final.pth").is_file()
