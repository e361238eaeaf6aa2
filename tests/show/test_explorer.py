"""The explorer protocol, on the toy: no browser, no front end."""

import threading
import time

import IPython.display
import pytest
from hypothesis import given, settings, strategies as st
from toy import RoundingExplorer

from qlora_lab.show.explorer import Explorer
from qlora_lab.show.slider import Button
from qlora_lab.show.still import VIEW

START = {"bits": 4, "offset": 0.25, "mode": "round", "clip": True}
STATES = st.fixed_dictionaries(
    {
        "bits": st.integers(1, 8),
        "offset": st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5]),
        "mode": st.sampled_from(["round", "floor"]),
        "clip": st.booleans(),
    }
)
shared = RoundingExplorer()


@pytest.mark.slow
@given(STATES)
@settings(max_examples=20, deadline=None)
def test_a_state_and_its_explorer_are_one(state):
    fresh = RoundingExplorer(**state)
    shared.set(**state)
    assert fresh.state == shared.state == state
    assert fresh.png == shared.png
    assert fresh.result["rmse"] == RoundingExplorer.compute(state)["rmse"]
    assert fresh.summary() == shared.summary() == RoundingExplorer.describe(state, RoundingExplorer.compute(state))
    assert eval(fresh.code()).state == state  # the line to copy really makes it again


@pytest.mark.long
def test_a_control_moves_picture_alt_text_and_code():
    explorer = RoundingExplorer()
    before = explorer.png
    explorer._controls["bits"].set_state({"position": 0})  # what a browser sends
    assert explorer.png != before
    assert explorer._pane.alt.startswith("Rounding explorer: 2 steps, RMSE")
    assert "RoundingExplorer(bits=1, offset=0.25" in explorer._pane.below


@pytest.mark.long
def test_two_threads_leave_the_picture_of_the_last_state(monkeypatch):
    """JupyterLab has the kernel serve some controls in a second thread."""
    explorer, computing = RoundingExplorer(), threading.Event()
    controls = explorer._controls

    def slow(state):
        if not computing.is_set():
            computing.set()
            for _ in range(1000):  # at most 10 s, until the other control has moved
                if controls["offset"].value == 0.0:
                    break
                time.sleep(0.01)
        return RoundingExplorer.compute(state)

    monkeypatch.setattr(explorer, "compute", slow)
    first = threading.Thread(target=lambda: controls["bits"].set_state({"position": 0}))
    second = threading.Thread(target=lambda: controls["offset"].set_state({"position": 0}))
    first.start()
    computing.wait(10)
    second.start()
    first.join()
    second.join()
    want = RoundingExplorer(bits=1, offset=0.0)
    assert explorer.state == want.state and explorer.png == want.png
    assert (explorer._pane.png, explorer._pane.below) == (want._pane.png, want._pane.below)


@pytest.mark.long
def test_reset_returns_to_where_the_explorer_was_opened():
    explorer = RoundingExplorer(bits=1, clip=False)
    opened, picture = explorer.state, explorer.png
    explorer.set(bits=8, offset=0.5)
    explorer.reset()
    assert explorer.state == opened == {**START, "bits": 1, "clip": False}
    assert explorer.png == picture


def test_the_reset_button_resets():
    explorer = RoundingExplorer(bits=1)
    explorer.set(bits=2)
    panel = explorer.widget.children[1].children[0]
    (button,) = [child for child in panel.children if isinstance(child, Button)]
    button.set_state({"clicks": 1})
    assert explorer.state == {**START, "bits": 1}


@pytest.mark.long
def test_several_fields_at_once_draw_once(monkeypatch):
    explorer, drawn = RoundingExplorer(), []
    monkeypatch.setattr(explorer, "update", drawn.append)
    explorer.set(bits=2, clip=False, mode="floor")
    assert len(drawn) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"bits": 9}, r"^bits=9 is not allowed: from 1 to 8 in steps of 1\. Nearest: 8\."),
        ({"offset": 0.26}, r"^offset=0.26 is not allowed: from 0.0 to 0.5 in steps of 0.1\. Nearest: 0.25\."),
        ({"mode": "up"}, r"^mode='up' is not allowed: one of 'round', 'floor'\."),
        ({"clip": 1}, r"^clip=1 is not allowed: it is a switch\."),
        ({"bit": 3}, r"^RoundingExplorer has no field 'bit': use bits, offset, mode, clip\."),
    ],
)
def test_a_bad_state_is_refused_whole(state, message):
    with pytest.raises(ValueError, match=message):
        RoundingExplorer(**state)
    explorer = RoundingExplorer()
    with pytest.raises(ValueError, match=message):
        explorer.set(bits=2, **state) if "bits" not in state else explorer.set(**state)
    assert explorer.state == START


@pytest.mark.long
def test_a_notebook_gets_a_still_and_after_it_the_view_alone(monkeypatch):
    """In one output JupyterLab would prefer the view, even when its widget is gone."""
    explorer, shown = RoundingExplorer(), []
    monkeypatch.setattr(IPython.display, "display", lambda bundle, raw: shown.append(bundle))
    explorer._ipython_display_()
    still, view = shown
    assert sorted(still) == ["text/html", "text/plain"]
    assert still["text/plain"] == repr(explorer) == "Rounding explorer: 16 steps, RMSE 0.1157"
    assert 'alt="Rounding explorer: 16 steps, RMSE 0.1157"' in still["text/html"]
    assert still["text/html"].count("data:image/png;base64,") == 1
    assert {VIEW: view[VIEW]} == view


def test_show_source_holds_compute():
    source = RoundingExplorer().widget.children[2].value
    assert source.startswith("<details><summary") and "compute" in source


def test_the_protocol_is_enforced():
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (Explorer,), {"controls": lambda self: {}})()
