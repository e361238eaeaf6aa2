"""The explorer of an answer's speed: its roofs are those of the work, and its ridge is where they meet."""

from functools import cache

import pytest

from qlora_lab.memory.answers import Machine, step_work
from qlora_lab.show.answers import ROUND, ROWS, AnswerSpeedExplorer


@cache
def shared() -> AnswerSpeedExplorer:
    return AnswerSpeedExplorer()


def test_the_point_lies_under_both_roofs():
    shared().reset()
    for rows in (1, 16, 256):
        shared().set(rows=rows)
        ((x,), (y,)) = shared().point.get_data()
        memory, processor = (dict(zip(*line.get_data(), strict=True)) for line in (shared().memory, shared().processor))
        assert x == rows and y == pytest.approx(min(memory[rows], processor[rows]))
        assert y == pytest.approx(rows / shared().result["step"])


def test_the_limit_changes_at_the_ridge():
    shared().set(context=16, bits=16)
    ridge = shared().result["ridge"]
    for rows in ROWS:
        shared().set(rows=rows)
        assert shared().result["limit"] == ("memory" if rows <= ridge else "computing")
    assert f"the ridge is at {ridge:.3g} texts" in shared().summary()
    assert list(shared().ridge.get_xdata()) == [ridge, ridge] and ridge in shared().below.get_xdata()


def test_a_long_context_has_no_ridge():
    shared().set(context=8192, rows=256)
    assert shared().result["ridge"] is None and shared().result["limit"] == "memory"
    assert "memory limits any number of texts" in shared().summary() and not len(shared().ridge.get_xdata())


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
