"""The notebook docs/tour.ipynb runs from its first cell to its last."""

import re

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbformat import NotebookNode

FILE = ROOT / "docs/tour.ipynb"
LINK = re.compile(r"\]\(([^)#:]+)\)")


@pytest.fixture
def tour() -> NotebookNode:
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_cells_are_short_and_without_outputs(tour):
    code = [cell for cell in tour.cells if cell.cell_type == "code"]
    assert len(code) > 5 and not any(cell.outputs or cell.execution_count for cell in code)
    assert max(len(cell.source.splitlines()) for cell in code) < 40


def test_links_lead_somewhere(tour):
    links = [target for cell in tour.cells if cell.cell_type == "markdown" for target in LINK.findall(cell.source)]
    assert len(links) > 3 and not [target for target in links if not (FILE.parent / target).exists()]


@pytest.mark.slow
def test_every_cell_runs(tour, tmp_path):
    """In an empty folder. The losses of ten steps fall, and the images of the five ways to sample are there."""
    NotebookClient(tour, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in tour.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    told = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "DiT: 28 blocks, 14 long skips" in told
    assert float(re.search(r"PSNR against the uncached images: (\S+) dB", told)[1]) > 15
    assert re.search(r"^F[FSO]{7}$", told, flags=re.M)
    losses = [float(loss) for loss in re.findall(r"^step +\d+: loss (\S+)$", told, flags=re.M)]
    assert len(losses) == 10 and losses[-1] < losses[0]
    assert not list(tmp_path.iterdir())
