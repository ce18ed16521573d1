import copy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parent.parent / "tour.ipynb"


@pytest.mark.slow
def test_the_tour_runs_from_top_to_bottom_and_draws_what_it_says(tmp_path):
    stored = nbformat.read(TOUR, as_version=4)
    tour = copy.deepcopy(stored)
    for cell in tour.cells:
        shorter = {
            "logs/tour": str(tmp_path / "tour"),
            "--total_epoch 8": "--total_epoch 1",
            "--seed 1 2 3": "--seed 1",
        }
        for old, new in shorter.items():
            cell.source = cell.source.replace(old, new)
    NotebookClient(tour, timeout=600, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    for cell, before in zip(tour.cells, stored.cells, strict=True):  # the kept outputs are of the same kinds
        assert kinds(cell) == kinds(before), cell.source


def kinds(cell):
    return {kind for output in cell.get("outputs", []) for kind in output.get("data", {"text": 0})}


def test_the_tour_is_small_and_kept_with_its_outputs():
    assert TOUR.stat().st_size < 400_000
    code = [cell for cell in nbformat.read(TOUR, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
