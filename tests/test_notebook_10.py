"""The exercises of notebook 10, whose solutions cannot be a second notebook that trains for minutes again."""

import json
from pathlib import Path

import pytest
import torch

import qlora_lab as ql
from qlora_lab.adapters.lora import LoRALinear
from qlora_lab.model.linear4bit import Linear4bit

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "10_finetune_llama.ipynb"
SOLUTIONS = {
    "trainable_at_64": "sum(64 * sum(q.shape) for q in packed)",
    "bytes_for_the_adapter": "4 * 4 * trainable",  # weight, gradient, two moments
}


def exercises() -> dict[str, str]:
    cells = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    return {source.split(" = ...")[0]: source for source in sources if " = ...\n" in source}


def names() -> dict:
    packed = [ql.quantize(torch.ones(80, 120)), ql.quantize(torch.ones(200, 80))]
    trainable = 16 * (80 + 120 + 200 + 80)
    return {
        "ql": ql,
        "LoRALinear": LoRALinear,
        "Linear4bit": Linear4bit,
        "packed": packed,
        "trainable": trainable,
        "held": 16 * trainable,
    }  # held: measured in the notebook


def test_every_exercise_has_a_solution():
    assert exercises().keys() == SOLUTIONS.keys()


@pytest.mark.parametrize("name", SOLUTIONS)
def test_the_check_accepts_the_solution_and_nothing_else(name, capsys):
    source = exercises()[name]
    for answer, verdict in (("...", "not answered yet"), (SOLUTIONS[name], "correct"), ("-1", "not yet")):
        exec(source.replace(" = ...", f" = {answer}", 1), names())
        assert f"{name}: {verdict}" in capsys.readouterr().out
