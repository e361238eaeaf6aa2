"""The explorer of an answer's speed: its roofs are those of the work, and its ridge is where they meet."""

import pytest

from qlora_lab.memory.answers import Machine, step_work
from qlora_lab.show.answers import ROUND, ROWS, AnswerSpeedExplorer

EXPLORER = AnswerSpeedExplorer()


def test_the_point_lies_under_both_roofs():
    EXPLORER.reset()
    for rows in (1, 16, 256):
        EXPLORER.set(rows=rows)
        ((x,), (y,)) = EXPLORER.point.get_data()
        memory, processor = (dict(zip(*line.get_data(), strict=True)) for line in (EXPLORER.memory, EXPLORER.processor))
        assert x == rows and y == pytest.approx(min(memory[rows], processor[rows]))
        assert y == pytest.approx(rows / EXPLORER.result["step"])


def test_the_limit_changes_at_the_ridge():
    EXPLORER.set(context=16, bits=16)
    ridge = EXPLORER.result["ridge"]
    for rows in ROWS:
        EXPLORER.set(rows=rows)
        assert EXPLORER.result["limit"] == ("memory" if rows <= ridge else "computing")
    assert f"the ridge is at {ridge:.3g} texts" in EXPLORER.summary()
    assert list(EXPLORER.ridge.get_xdata()) == [ridge, ridge] and ridge in EXPLORER.below.get_xdata()


def test_a_long_context_has_no_ridge():
    EXPLORER.set(context=8192, rows=256)
    assert EXPLORER.result["ridge"] is None and EXPLORER.result["limit"] == "memory"
    assert "memory is the limit for any number of texts" in EXPLORER.summary() and not len(EXPLORER.ridge.get_xdata())


def test_your_own_machine_and_model():
    mine = Machine(1e9, 1e12)
    explorer = AnswerSpeedExplorer("llama-13b", mine, context=16)
    work = step_work("llama-13b", 16, 4.127)
    assert explorer.result["step"] == work.seconds(mine, 1)[0] and explorer.result["ridge"] == work.ridge(mine)


def test_all_states_differ_and_reset_returns():
    explorer = AnswerSpeedExplorer(rows=4)
    first = explorer.png
    explorer.set(rows=8)
    assert explorer.png != first
    explorer.reset()
    assert explorer.png == first and explorer.machine == ROUND
