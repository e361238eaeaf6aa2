"""The explorer of notebook 03 in the real JupyterLab, on drawn errors of 210 layers: the notebook takes two minutes."""

import re

import nbformat
from playwright.sync_api import expect

CELLS = [
    "import numpy as np\nimport qlora_lab as ql\nfrom qlora_lab.measure.best_plan import Candidate, Choices",
    """parts = {"q": 9, "k": 3, "v": 3, "o": 9, "gate": 24, "up": 24, "down": 24}
layers = tuple(f"model.layers.{i}.mlp.{part}_proj" for i in range(30) for part in parts)
numel = np.array(30 * list(parts.values())) * 2**12
sizes = np.array([32, 64, 128, 256, 512, 1024])
candidates = tuple(Candidate("nf4", int(size), False) for size in sizes)
damage = np.random.default_rng(0).lognormal(size=210)
error = damage[:, None] * np.log2(sizes)
from qlora_lab.show.block_size import BlockSizeExplorer
choices = Choices(layers, tuple(numel.tolist()), candidates, error, numel[:, None] * (4 + 32 / sizes))""",
    "BlockSizeExplorer(choices, budget=4.5)",
]


def test_the_block_size_explorer(open_notebook, tmp_path):
    kernel = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}  # without it Lab asks which one
    notebook = nbformat.v4.new_notebook(metadata=kernel, cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    nbformat.write(notebook, tmp_path / "block_size.ipynb")
    lab = open_notebook(tmp_path / "block_size.ipynb")
    picture = lab.picture("Budget")
    assert "4.5000 spent on 210 layers" in picture.get_attribute("alt")
    assert "Budget 4.625 bits per parameter" in lab.move("Budget", "ArrowRight")
    lab.page.screenshot(path=tmp_path / "moved.png")
    assert "0.0 % less than 32 for all; block size 32 in 210" in lab.move("Budget", "End")
    assert "0.0 % less than 1024 for all; block size 1024 in 210" in lab.move("Budget", "Home")
    lab.page.get_by_role("button", name="Reset").press("Enter")
    expect(picture).to_have_attribute("alt", re.compile("^Budget 4.5 bits"))  # where it was opened
    lab.move("Budget", "ArrowLeft")
    assert lab.unnamed() == []
