"""Notebook 09 in the real JupyterLab: the page table follows the keyboard, and every control has a name."""

import re
from pathlib import Path

from playwright.sync_api import expect

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_the_page_table(open_notebook):
    lab = open_notebook(NOTEBOOKS / "09_paged_optimizer.ipynb")
    picture = lab.picture("Budget")
    assert "in 153 pages of 2 MiB, a budget of 256 MiB with 128 frames" in picture.get_attribute("alt")
    assert "at time 1.45 page 68 is asked for, a fault, and page 93 leaves" in lab.move("Time", "ArrowRight")
    assert "a budget of 272 MiB with 136 frames" in lab.move("Budget", "ArrowRight")
    assert "with 153 frames: in each step after the first 0 faults" in lab.move("Budget", "End")
    assert "r=15," in lab.move("r", "ArrowLeft")
    assert "of 1 MiB" in lab.move("Page size", "ArrowLeft")
    assert "moments of 8 bits: 72.6 MiB of state" in lab.move("Moments", "ArrowLeft")
    lab.page.get_by_role("button", name="Reset").press("Enter")
    expect(picture).to_have_attribute("alt", re.compile("r=16, moments of 32 bits: .* a budget of 256 MiB"))
    assert lab.unnamed() == []
