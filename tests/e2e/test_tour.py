"""The tour: it runs from a clean state, and what is committed is such a run.

``.venv/bin/jupyter execute --inplace notebooks/tour.ipynb`` writes its outputs anew.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from projects import Project

TOUR = Path(__file__).parents[2] / "notebooks" / "tour.ipynb"
TIMEOUT_SECONDS = 300
MAX_BYTES = 100_000


@pytest.fixture
def tour() -> nbformat.NotebookNode:
    """The notebook as it is committed."""
    return nbformat.read(TOUR, as_version=4)


def code_cells(book: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def printed(book: nbformat.NotebookNode) -> dict[str, str]:
    """What each cell printed, by the cell's id; anything but text is an error here."""
    return {
        cell["id"]: "".join(output["text"] for output in cell.outputs) for cell in code_cells(book)
    }


def test_the_committed_outputs_are_of_one_run(tour: nbformat.NotebookNode) -> None:
    counts = [cell.execution_count for cell in code_cells(tour)]
    assert counts == list(range(1, len(counts) + 1)), f"execute {TOUR.name} from the top"


def test_the_committed_outputs_are_small_and_tied_to_no_machine(
    tour: nbformat.NotebookNode,
) -> None:
    assert TOUR.stat().st_size <= MAX_BYTES
    text = "\n".join(printed(tour).values())
    assert re.findall(r"(?<![\w.])(?:/\w[\w.-]*){2,}|\b[A-Z]:\\", text) == []


@pytest.mark.e2e
def test_the_tour_runs_from_the_top(tour: nbformat.NotebookNode, run: tuple[Project, Any]) -> None:
    """In a project with a run of the `test` environment; where there is none, it makes one."""
    folder = run[0].folder / "notebooks"
    folder.mkdir()
    for cell in code_cells(tour):
        cell.outputs, cell.execution_count = [], None
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(tour, timeout=TIMEOUT_SECONDS, resources=resources)
    client.execute()  # raises if a cell does; the cells check what they show
    texts = printed(tour)
    assert "household_id product_id basket_id → bought" in texts["spec"]
    assert "candidate" in texts["summary"]
    assert "golden rows, differences within 1e-06" in texts["champion"]
    assert re.search(r"logit +[+-]\d+\.\d+ +→ probability 0\.\d+", texts["explain"])
    assert re.search(r"retrain: (True|False)", texts["drift"])
