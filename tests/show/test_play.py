"""The button that plays a slider, without a browser: `set_state` is the path of the page's message."""

import pytest

from qlora_lab.show.midpoint import MidpointExplorer
from qlora_lab.show.page_table import PageTableExplorer
from qlora_lab.show.play import Play
from qlora_lab.show.slider import Slider


def test_a_tick_takes_the_next_value_and_says_when_it_is_drawn():
    slider = Slider("Time", 1, choices=[0, 1, 2])
    play, seen = Play(slider), []
    slider.observe(lambda change: seen.append((change["new"], play.shown)), "value")
    for tick in (1, 2, 3):
        play.set_state({"ticks": tick})
        assert play.shown == tick
    assert seen == [(2, 0), (0, 1), (1, 2)]  # from the end to the start; drawn before the page hears of it


def test_it_knows_the_end():
    slider = Slider("Time", 1, choices=[0, 1, 2])
    play = Play(slider)
    assert not play.last
    play.set_state({"ticks": 1})
    assert play.last
    slider.value = 0  # by hand
    assert not play.last
    assert Play(Slider("Time", 2, choices=[0, 1, 2])).last


@pytest.mark.long
@pytest.mark.parametrize(("explorer", "field"), [(MidpointExplorer, "change"), (PageTableExplorer, "time")])
def test_an_explorer_plays(explorer, field):
    made = explorer()
    (play,) = (child for child in made.widget.children[1].children[0].children if isinstance(child, Play))
    before = made.png
    choices = made._controls[field].choices
    place = choices.index(made.state[field])
    play.set_state({"ticks": 1})
    assert made.state[field] == choices[place + 1] and made.png != before
    assert explorer(**made.state).png == made.png
