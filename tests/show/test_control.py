"""A page may send any state through the comm: it is valid or changes nothing."""

import math

import pytest
from test_block_size import LARGER
from test_seeing import TOWER
from test_survival import SURVIVED
from toy import RoundingExplorer
from toy_checkpoint import toy_checkpoint

from qlora_lab.show.answers import AnswerSpeedExplorer
from qlora_lab.show.block_size import BlockSizeExplorer
from qlora_lab.show.constants import ConstantsExplorer
from qlora_lab.show.data_types import CodebookExplorer, OutlierExplorer
from qlora_lab.show.hex_page import HexPage
from qlora_lab.show.kernel_map import KernelMapExplorer
from qlora_lab.show.levels import Levels
from qlora_lab.show.low_rank import LowRankExplorer
from qlora_lab.show.memory import MemoryExplorer
from qlora_lab.show.midpoint import MidpointExplorer
from qlora_lab.show.normal_float import NormalFloatExplorer
from qlora_lab.show.page_table import PageTableExplorer
from qlora_lab.show.pane import Pane
from qlora_lab.show.play import Play
from qlora_lab.show.seeing import SeeingExplorer
from qlora_lab.show.slider import Button, Slider, Toggle
from qlora_lab.show.still import StatusLine
from qlora_lab.show.survival import SurvivalExplorer
from qlora_lab.show.tournament import TournamentExplorer
from qlora_lab.show.xray import XrayExplorer
from qlora_lab.show.zoo import ZooExplorer
from tests.explorers import explorers

COURSE = [NormalFloatExplorer, ConstantsExplorer, KernelMapExplorer, OutlierExplorer, CodebookExplorer]
COURSE += [LowRankExplorer, MemoryExplorer, PageTableExplorer, MidpointExplorer, ZooExplorer, TournamentExplorer]
COURSE += [AnswerSpeedExplorer]
OF_DATA = {BlockSizeExplorer: LARGER, SurvivalExplorer: SURVIVED, SeeingExplorer: TOWER}
EVEN = [i / 10 for i in range(-8, 8)]
ANYTHING = ["x", "x" * 10**6, None, math.nan, math.inf, 1.5, [], [1], {}, {"a": [1]}, memoryview(b"12345678")]
NO_LEVELS = [
    *([*EVEN[:15], wrong] for wrong in (1.5, -0.9, EVEN[14], math.nan, None, "0.7", True, [0.7], 10**400)),
    *([EVEN], [*EVEN, 0.9], EVEN[:15], EVEN[::-1], [EVEN] * 16, [[[[]]]], list(range(10**5)), 3, -1, False),
]
HOSTILE = {
    Slider: [*ANYTHING, 10**9, -1, True, 10**400],
    Toggle: [*ANYTHING, 3, 0, 1],
    Button: [*ANYTHING, -1, 2**53, True],
    Play: [*ANYTHING, -1, 2**53, True],
    Levels: [*ANYTHING, *NO_LEVELS],
    HexPage: [*ANYTHING, -1, 64, True, 10**400],
}
NO_STATES = [[1], 5, None, "x", True]
SHOWN = {"png": memoryview(b"x"), "alt": "x", "least": 5, "below": "<img src=x onerror=alert(1)>", "text": "x"}
FOREIGN = {"description": "x", "labels": ["x"], "unit": 3, "layout": None, "_esm": "export default 1", "colour": 1}


def send(control, **state):
    """Give the control a message as its comm does."""
    send_any(control, state)


def send_any(control, state):
    control._handle_msg({"content": {"data": {"method": "update", "state": state, "buffer_paths": []}}, "buffers": []})


def parts(explorer):
    """The status line and the controls with the buttons."""
    line, row, _ = explorer.widget.children
    buttons = [child for child in row.children[0].children if isinstance(child, (Button, Play))]
    assert len(buttons) == 1 + bool(explorer.played)
    return line, [*explorer._controls.values(), *buttons]


def now(control):
    """A right message: the state that it has."""
    return {
        field: list(value) if isinstance(value, tuple) else value
        for field, value in control.get_state(control.moved).items()
    }


def shown(explorer):
    return explorer.state, explorer.png, explorer._pane.get_state(), [part.get_state() for part in parts(explorer)[1]]


@pytest.fixture(params=[RoundingExplorer, *OF_DATA, XrayExplorer, *COURSE], ids=lambda explorer: explorer.__name__)
def explorer(request, tmp_path):
    if request.param is XrayExplorer:
        return XrayExplorer(toy_checkpoint(tmp_path))
    return request.param(OF_DATA[request.param]) if request.param in OF_DATA else request.param()


def test_every_explorer_is_tried():
    assert explorers() == {*OF_DATA, XrayExplorer, *COURSE}


@pytest.mark.long
def test_an_impossible_value_changes_nothing_and_is_named(explorer, logged, monkeypatch):
    before = shown(explorer)
    monkeypatch.setattr(explorer, "update", None)  # a redraw would raise
    line, controls = parts(explorer)
    for control in controls:
        (values,) = (values for kind, values in HOSTILE.items() if isinstance(control, kind))
        for value in values:
            send(control, **{control.moved: value})
            assert line.text == control.refused
            assert line.text.startswith(f'Refused: "{control.description}" got {control.moved} ')
            assert line.text.endswith(f", which must be {control.rule()}.")
            assert len(line.text) < 300
        for field, value in FOREIGN.items():
            send(control, **now(control), **{field: value})
            assert line.text.endswith(f" got {field}, but a page may change only its {control.moved}.")
    for part in (explorer._pane, line):
        kept = part.get_state()
        for field, value in (SHOWN | FOREIGN).items():
            send(part, **{field: value})
        assert part.get_state() == kept
    monkeypatch.undo()
    assert shown(explorer) == before
    assert logged == []  # ipywidgets logs what a message raises
    send(controls[0], **now(controls[0]))
    assert line.text == ""


def test_the_sentences():
    bits = Slider("Bits", 4, [2, 3, 4])
    send(bits, position=10**9)
    assert bits.refused == 'Refused: "Bits" got position 1000000000, which must be a whole number from 0 to 2.'
    symmetric = Toggle("Symmetric")
    send(symmetric, value=3)
    assert symmetric.refused == 'Refused: "Symmetric" got value 3, which must be true or false.'
    send(symmetric, description="Asymmetric")
    assert symmetric.refused == 'Refused: "Symmetric" got description, but a page may change only its value.'
    reset = Button("Reset")
    send(reset, clicks=3)
    send(reset, clicks=2)
    assert reset.refused == 'Refused: "Reset" got clicks 2, which must be a whole number of at least 3.'
    levels = Levels("Levels", EVEN)
    send(levels, value=["a"])
    assert levels.refused == "Refused: \"Levels\" got value ['a'], which must be 16 ascending numbers in [-1, 1]."


@pytest.mark.parametrize("state", NO_STATES, ids=repr)
def test_a_state_without_fields_is_refused(state, monkeypatch):
    bits, sent = Slider("Bits", 4, [2, 3, 4]), []
    line, pane = StatusLine(bits), Pane(alt="a line")
    for widget in (bits, line, pane):
        monkeypatch.setattr(widget, "_send", lambda message, buffers=None: sent.append(message["state"]))
    send_any(bits, state)
    said = 'Refused: "Bits" got a state without fields, but a page may change only its position.'
    assert bits.refused == said == line.text
    assert sent[-1]["position"] == 2  # the page shows the true state again
    send_any(pane, state)
    assert sent[-1]["alt"] == "a line"


def test_the_page_is_sent_the_true_state_again(monkeypatch):
    bits, sent = Slider("Bits", 4, [2, 3, 4]), []
    monkeypatch.setattr(bits, "_send", lambda message, buffers=None: sent.append(message))
    send(bits, position=7, description="x")
    (message,) = sent
    assert message["method"] == "update"
    assert message["state"]["position"] == 2 and message["state"]["description"] == "Bits"


def test_the_sentence_stays_until_a_control_moves():
    bits, symmetric = Slider("Bits", 4, [2, 3, 4]), Toggle("Symmetric")
    line = StatusLine(bits, symmetric)
    for way in (lambda: send(symmetric, value=True), lambda: send(bits, position=2), lambda: setattr(bits, "value", 3)):
        send(bits, position=-1)
        assert line.text == bits.refused != ""
        way()
        assert line.text == ""


def test_the_same_sentence_again_is_shown_again():
    bits, symmetric = Slider("Bits", 4, [2, 3, 4]), Toggle("Symmetric")
    line = StatusLine(bits, symmetric)
    send(bits, position=9)
    of_bits = line.text
    send(symmetric, value=3)
    of_symmetric = line.text
    assert "" != of_bits != of_symmetric != ""
    send(bits, position=9)
    assert line.text == of_bits
    send(symmetric, value=3)
    send(bits, position=2)  # its own position, so no control moves
    assert line.text == ""
    send(symmetric, value=3)
    assert line.text == of_symmetric
