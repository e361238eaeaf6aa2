"""A page without a kernel: its size, its states, what it is refused to replace, and that saving it changes nothing.

What a browser makes of it: tests/browser/test_playable.py.
"""

import base64
import json
import re
import zlib

import pytest
import torch
from toy import RoundingExplorer

from qlora_lab.show import playable
from qlora_lab.show.data_types import STARTS
from qlora_lab.show.follow_weight import FollowWeight
from qlora_lab.show.hex_page import HexPage
from qlora_lab.show.levels import Levels
from qlora_lab.show.play import Play
from qlora_lab.show.slider import Slider, Steps


def content_of(path):
    """What the page was given, but for its pictures."""
    parts = re.search(r'id="film">([^<]*)<', path.read_text("utf-8"))[1].split(" ")
    return json.loads(zlib.decompress(base64.b64decode(parts[0])))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(playable, "MOST", 30)


@pytest.mark.long
@pytest.mark.usefixtures("few")
def test_each_state_has_the_words_of_an_explorer_in_that_state(tmp_path):
    explorer = RoundingExplorer(bits=3, offset=0.4)
    saved = explorer.save_html(tmp_path / "toy.html", progress=False)
    content = content_of(saved.path)
    assert saved.states == len(content["states"]) == len(content["sentences"]) <= 30
    assert saved.nbytes == saved.path.stat().st_size <= playable.LIMIT
    assert content["codes"][0] == explorer.code()  # it opens in the state that was set
    for i in range(1, 30, 7):  # a new explorer takes a third of a second
        assert eval(content["codes"][i]).summary() == content["sentences"][i]
    shown = {control["state"]["description"]: len(control["stops"]) for control in content["controls"]}
    assert shown == {"Bits": saved.stops["bits"][0], "Offset": saved.stops["offset"][0], "Mode": 2, "Clip outliers": 2}
    note = re.search(r'class="note">(.*?)<', saved.path.read_text("utf-8"))[1]
    assert f"Bits has {saved.stops['bits'][0]} of 8 stops" in note


@pytest.mark.long
@pytest.mark.usefixtures("few")
def test_saving_leaves_the_explorer_and_its_live_view_as_they_were(tmp_path):
    explorer = RoundingExplorer(bits=3)
    before = explorer.state, explorer.png, explorer.summary(), explorer._pane.png, explorer._pane.below
    seen = []
    explorer._pane.observe(lambda change: seen.append(change.name))
    explorer.save_html(tmp_path / "toy.html", progress=False)
    after = explorer.state, explorer.png, explorer.summary(), explorer._pane.png, explorer._pane.below
    assert after == before and not seen
    explorer.set(bits=2)
    assert explorer.png != before[1]  # it still follows


class Played(RoundingExplorer):
    played = "bits"


@pytest.mark.long
def test_a_page_has_the_play_button_which_hears_nothing_of_the_drawing(tmp_path, monkeypatch):
    monkeypatch.setattr(playable, "MOST", 9)  # the smallest page, which shows the last value of the slider, too
    explorer = Played(bits=3)
    sent = []
    monkeypatch.setattr(Play, "send_state", lambda play, key=None: sent.append(play.last))
    path = explorer.save_html(tmp_path / "toy.html", progress=False).path
    assert set(sent) <= {False}
    button = {"description": "Play Bits", "last": False, "shown": 0, "ticks": 0}
    assert content_of(path)["play"] == {"control": 0, "state": button}
    assert "Play:" in path.read_text("utf-8")  # its module
    path = RoundingExplorer().save_html(tmp_path / "still.html", progress=False).path
    assert content_of(path)["play"] is None and "Play:" not in path.read_text("utf-8")


@pytest.mark.long
def test_a_page_grows_until_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(playable, "_CSS", f"/* {'ä' * 5000} */")  # 10,000 bytes: the limit counts no letters
    monkeypatch.setattr(playable, "LIMIT", 60_000)
    small = RoundingExplorer().save_html(tmp_path / "toy.html", progress=False)
    monkeypatch.setattr(playable, "LIMIT", 90_000)
    large = RoundingExplorer().save_html(tmp_path / "toy.html", progress=False)  # its own page is replaced
    assert small.nbytes <= 60_000 < large.nbytes <= 90_000
    assert small.states < large.states


@pytest.mark.long
def test_a_file_of_somebody_else_stays(tmp_path):
    mine = tmp_path / "notes.html"
    mine.write_text("<!doctype html><title>notes</title>")
    for thing in (RoundingExplorer(), FollowWeight(torch.eye(16))):
        with pytest.raises(
            FileExistsError, match="notes.html exists and is not an explorer's page, so it is kept: name"
        ):
            thing.save_html(mine)
        with pytest.raises(FileExistsError, match="is not a file, so it cannot become an explorer.s page"):
            thing.save_html(tmp_path)
        with pytest.raises(ValueError, match="the path is empty"):
            thing.save_html("")
        with pytest.raises(FileNotFoundError, match="there is no folder .*new: create it"):
            thing.save_html(tmp_path / "new" / "page.html")
    assert mine.read_text().endswith("notes</title>") and list(tmp_path.iterdir()) == [mine]


@pytest.mark.long
@pytest.mark.usefixtures("few")
def test_names_in_a_page_are_text(tmp_path):
    class Marked(RoundingExplorer):
        @staticmethod
        def describe(state, result):
            return "</script><img src=x onerror=alert(1)> $x$"

    page = Marked().save_html(tmp_path / "toy.html", progress=False).path.read_text("utf-8")
    assert "onerror" not in page and page.count("<script") == 2
    assert not re.search(r'\bon\w+="', page)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)  # a namespace is no address


@pytest.mark.long
def test_follow_weight_keeps_its_station(tmp_path):
    path = FollowWeight(torch.eye(16), lit="byte").save_html(tmp_path / "way.html")
    state = content_of(path)["state"]
    assert (state["place"], len(state["stations"]), path.stat().st_size < 100_000) == (6, 14, True)


@pytest.mark.parametrize("levels", [STARTS["NF4"], tuple(i / 100 for i in range(-8, 8)), tuple(range(-8, 8))])
def test_levels_on_a_page_are_levels(levels):
    control = Levels("Levels", [level / max(1, -levels[0]) for level in levels], starts=STARTS)
    stops = sum(control.rounds(), [])
    assert control.value in stops and set(STARTS.values()) <= set(stops) and len(set(stops)) == len(stops)
    assert all(control.takes(list(stop)) for stop in stops)


def test_the_rounds_of_a_slider():
    assert Slider("a", "y", choices=["x", "y", "z"]).rounds() == [[0, 1, 2]]  # no word is left out
    assert Slider("a", 0.25, Steps(0.0, 1.0, 0.25)).rounds() == [[0, 1, 4], [2], [3]]
    assert HexPage("a").rounds() == [list(range(64))]
    labels = ["0", "0.25", "0.5", "0.75", "1"]
    assert Slider("a", 0.25, Steps(0.0, 1.0, 0.25)).on_page([0, 1, 4]) == ({"labels": ["0", "0.25", "1"]}, [0, 1, 2])
    assert Slider("a", 0.25, Steps(0.0, 1.0, 0.25)).labels == labels
