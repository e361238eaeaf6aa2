"""Kept letters are the pixels that matplotlib draws, wherever they stand, and the second time as the first."""

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from qlora_lab.show import lettering
from qlora_lab.show.explorer import fix_layout
from qlora_lab.show.figure import new_figure


@pytest.fixture
def page():
    fig, ax = new_figure(width=2, height=1)
    ax.set_axis_off()
    fix_layout(fig)
    return fig, ax, FigureCanvasAgg(fig)


def both(page, **look):
    """The pixels of a text on a blue page: by matplotlib, and by lettering."""
    fig, ax, canvas = page
    fig.set_facecolor("#0072b2")
    text = ax.text(look.pop("x", 0.1), look.pop("y", 0.5), look.pop("said", "Ag 0.85 %"), **look)
    text.set_animated(True)
    with matplotlib.rc_context({"text.hinting": "none"}):
        canvas.draw()
        plain = np.asarray(canvas.buffer_rgba())
        empty = plain.copy()
        lettering.draw(fig, text, plain)
        ours = plain.copy()
        plain[:] = empty
        fig.draw_artist(text)
    text.remove()
    return plain.astype(int), ours.astype(int), empty


@pytest.mark.long
@pytest.mark.parametrize(
    "look",
    [{}, {"color": "#ffffff", "weight": "bold"}, {"ha": "right", "va": "top", "fontsize": 9}, {"x": 0.1037, "y": 0.513}]
    + [{"said": "two\nlines"}, {"said": "$x^2$"}, {"x": 0.8, "said": "cut off"}, {"x": -0.2}, {"y": 1.02}],
)
def test_the_pixels_are_matplotlibs(page, look):
    for _ in range(2):  # drawn, then kept
        plain, ours, empty = both(page, **look)
        assert np.abs(plain - ours).max() <= 1 and (plain != empty).any()  # Agg rounds a product another way


def test_an_empty_or_hidden_text_draws_nothing(page):
    for look in ({"said": " "}, {"visible": False}):
        _, ours, empty = both(page, **look)
        assert np.array_equal(ours, empty)


@pytest.mark.parametrize("look", [{"bbox": {}}, {"rotation": 90}, {"alpha": 0.5}, {"clip_on": True}])
def test_what_is_more_than_letters_is_left_to_matplotlib(page, look):
    _, ax, _ = page
    assert lettering.is_plain(ax.text(0, 0, "x")) and not lettering.is_plain(ax.text(0, 0, "x", **look))


def test_few_texts_are_kept(page, monkeypatch):
    monkeypatch.setattr(lettering, "_kept", kept := {})
    monkeypatch.setattr(lettering, "KEPT", 2)
    for said in "abca":
        both(page, said=said)
    assert [look[0] for look in kept] == ["c", "a"]
    both(page, said="cut", x=0.95)  # an edge cuts it, so it is not kept, and takes nobody's place
    assert [look[0] for look in kept] == ["c", "a"]


def test_a_text_that_an_edge_cuts_has_all_its_letters_elsewhere(page):
    """Both anchors lie at the same fraction of a pixel, so the look is the same."""
    _, ax, _ = page
    ax.set_position([0, 0, 1, 1])  # 288 x 144 pixels
    both(page, said="look", x=280 / 288, y=0.5)
    plain, ours, _ = both(page, said="look", x=28 / 288, y=0.5)
    assert np.abs(plain - ours).max() <= 1
    both(page, said="look", x=280 / 288, y=0.5)  # and what is whole may be cut
