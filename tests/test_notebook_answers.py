"""Answers that a student may well give, and that are wrong: the checks of notebooks 03, 06 and 08 must not take them.

Each cell with a check runs as it is stored, with what it needs of the cells before, and with the wrong answer in the
place of the student's. That the right ones are taken, the stored solutions show (tools/notebook_rules.py, unsolved).
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import qlora_lab as ql
from qlora_lab.memory.shape import shape_of
from qlora_lab.show.data_types import normal_weights

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
KNOWN = {"np": np, "torch": torch, "normal_weights": normal_weights}
KNOWN["table"] = torch.tensor([-1.0, -0.3, 0.5, 1.0])  # of notebook 06


def restored(weights, levels, scale):
    return levels[(levels - (weights / scale)[:, None]).abs().argmin(1)] * scale


def smallest(fits):
    return next(2**i for i in range(4, 20) if fits(2**i))


def trained(name, r, nbytes):
    return nbytes * r * sum(one.in_features + one.out_features for one in shape_of(name).linears)


def stored_bytes(weights, blocks):
    return -(-weights // 2) + blocks + 4 * -(-blocks // 256) + 4


WRONG = {
    "03 my_block_size": {
        "less than, not at most": lambda bits, share: smallest(lambda size: 32 / size < share * bits),
        "a share of codes and constants": lambda bits, share: smallest(
            lambda size: 32 / size <= share * (bits + 32 / size)
        ),
        "no power of two": lambda bits, share: 32 / (share * bits),
    },
    "03 my_damage": {
        "summed over tokens": lambda off, x: (off.square() @ x.square().sum(0)).sum().item(),
        "squared mean": lambda off, x: (off.square() @ x.mean(0).square()).sum().item(),
        "what these inputs make of it": lambda off, x: (x @ off.T).square().sum(1).mean().item(),
    },
    "06 my_block": {
        "largest, not largest magnitude": lambda weights, levels: restored(
            weights, levels, weights.max().clamp(min=1e-38)
        ),
        "not scaled back": lambda weights, levels: restored(weights / (weights.abs().max() + 1e-38), levels, 1),
        "codes": lambda weights, levels: (levels - weights[:, None]).abs().argmin(1),
    },
    "08 my_bytes": {
        "rounded down": lambda o, i, size: o * i // 2 + o * i // size + 4 * (o * i // size // 256) + 4,
        "constants in float32": lambda o, i, size: -(-o * i // 2) + 4 * -(-o * i // size),
        "blocks end with a row": lambda o, i, size: stored_bytes(o * i, o * -(-i // size)),
    },
    "08 my_trained": {
        "one layer": lambda name, r: trained(name, r, 16),
        "without gradients": lambda name, r: shape_of(name).layers * trained(name, r, 12),
        "in bf16": lambda name, r: shape_of(name).layers * trained(name, r, 8),
    },
}


class Answering:
    """qlora_lab, except that every check is given this answer."""

    def __init__(self, answer):
        self.answer = answer

    def __getattr__(self, name):
        return getattr(ql, name)

    def check(self, answer, expected, **how):
        ql.check(self.answer, expected, **how)


def cell_of(exercise):
    """Source of the cell in the student's notebook that checks `exercise`, such as "03 my_damage"."""
    number, name = exercise.split()
    (path,) = NOTEBOOKS.glob(f"{number}_*.ipynb")
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"]]
    (source,) = [source for source in cells if f'name="{name}"' in source]
    return source


@pytest.mark.parametrize(("exercise", "mistake"), [(e, mistake) for e, answers in WRONG.items() for mistake in answers])
def test_a_wrong_answer_gets_a_hint(exercise, mistake, capsys):
    unanswered = {exercise.split()[1]: ...}  # where the function stands in a cell of its own
    exec(cell_of(exercise), KNOWN | unanswered | {"ql": Answering(WRONG[exercise][mistake])})
    said = capsys.readouterr().out
    assert "not yet" in said and "Hint" in said and "raised" not in said
