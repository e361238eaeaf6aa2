"""Notebook 08 in the real JupyterLab: its explorer follows the keyboard, and every control has a name."""

import re
from pathlib import Path

from playwright.sync_api import expect

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def test_the_memory_explorer(open_notebook):
    lab = open_notebook(NOTEBOOKS / "08_memory.ipynb")
    picture = lab.picture("Sequence length")
    assert "fits on 8 GB; its peak is in the update" in picture.get_attribute("alt")
    assert "llama-3-8b, nf4/64 + double" in lab.move("Model", "ArrowRight")
    assert "nf2/64" in lab.move("Codebook", "Home")
    assert "nf2/512" in lab.move("Block size", "End")
    assert "r=256" in lab.move("r", "End")
    assert "1 x 65536 tokens" in lab.move("Sequence length", "End")
    assert "16 x 65536 tokens" in lab.move("Rows at once", "End")
    assert "paged 8-bit AdamW: QLoRA needs" in lab.move("Optimizer", "End")
    lab.page.get_by_role("checkbox", name="Double quantization").press("Space")
    expect(picture).to_have_attribute("alt", re.compile("nf2/512, r=256"))
    lab.page.get_by_role("checkbox", name="Gradient checkpointing").press("Space")
    expect(picture).to_have_attribute("alt", re.compile("tokens at once, paged 8-bit AdamW: .* too large for 80 GB"))
    lab.page.get_by_role("button", name="Reset").press("Enter")
    expect(picture).to_have_attribute("alt", re.compile("^llama-7b, .* 1 x 512 tokens at once, gradient checkpointing"))
    assert lab.unnamed() == []
