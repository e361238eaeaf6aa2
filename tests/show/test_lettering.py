"""Kept words are the pixels that matplotlib draws, wherever they stand, and the second time as the first."""

import matplotlib
import numpy as np
import pytest
from hypothesis import given, strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg

from qlora_lab.show import lettering
from qlora_lab.show.explorer import fix_layout
from qlora_lab.show.figure import new_figure


def new_page():
    fig, ax = new_figure(width=2, height=1)
    ax.set_axis_off()
    fix_layout(fig)
    return fig, ax, FigureCanvasAgg(fig)


@pytest.fixture
def page():
    return new_page()


PAGE = new_page()  # for many texts, which it loses again


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
    + [{"said": "two\n lines,  spaced", "ha": "center"}, {"said": "four → three ²"}, {"said": "AV To. fi ffl"}]
    + [{"x": 0.8, "said": "cut off"}, {"x": -0.2}, {"x": -9.0}, {"y": 1.02}],
)
def test_the_pixels_are_matplotlibs(page, look):
    for _ in range(2):  # drawn, then kept
        plain, ours, empty = both(page, **look)
        assert np.abs(plain - ours).max() <= 1  # Agg rounds a product another way
        assert (plain != empty).any() or look.get("x") == -9


@pytest.mark.long
@given(
    st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from(" 5AVfi→\n"), max_size=30),
    st.floats(0, 1) | st.sampled_from([0.5, 0.25]),  # halfway between two places of FreeType
    st.floats(0, 1),
    st.sampled_from(["left", "center", "right"]),
    st.sampled_from(["baseline", "top", "center", "bottom"]),
    st.sampled_from([{}, {"weight": "bold"}, {"fontsize": 9}, {"family": "monospace"}, {"style": "italic"}]),
)
def test_any_text_anywhere_is_matplotlibs(said, x, y, ha, va, look):
    """Whatever was drawn before: neighbours kern each other, and letters stand between pixels."""
    plain, ours, _ = both(PAGE, said=said.replace("$", "S"), x=x, y=y, ha=ha, va=va, **look)
    assert np.abs(plain - ours).max() <= 2  # where two letters touch, Agg rounds twice


@pytest.mark.long
def test_a_title_in_which_a_number_changes_draws_that_number(page, monkeypatch):
    drawn = []
    word = lettering._word
    monkeypatch.setattr(lettering, "_words", {})
    monkeypatch.setattr(lettering, "_word", lambda *look: drawn.append(look[2]) or word(*look))
    for said in ("Error 1.25 % of it", "Error 1.75 % of it", "Error 1.25 % of it"):
        plain, ours, _ = both(page, said=said)
        assert np.abs(plain - ours).max() <= 1
    assert drawn == ["Error ", "1.25 ", "% ", "of ", "it", "1.75 "]


def test_an_empty_or_hidden_text_draws_nothing(page):
    for look in ({"said": " "}, {"visible": False}, {"said": "\u200b"}, {"x": np.nan}):  # a space without width
        _, ours, empty = both(page, **look)
        assert np.array_equal(ours, empty)


@pytest.mark.parametrize(
    "look",
    [{"bbox": {}}, {"rotation": 90}, {"alpha": 0.5}, {"clip_on": True}, {"said": "$x^2$"}, {"usetex": True}]
    + [
        {"color": "none"},
        {"color": (1, 0, 0, 0.5)},
        {"antialiased": False},
        {"wrap": True},
        {"fontfeatures": ["ss01"]},
    ],
)
def test_what_is_more_than_letters_is_left_to_matplotlib(page, look):
    _, ax, _ = page
    assert lettering.is_plain(ax.text(0, 0, "x"))
    assert not lettering.is_plain(ax.text(0, 0, look.pop("said", "x"), **look))


def test_a_title_is_plain(page):
    """It has clip_on without anything to be clipped by."""
    assert lettering.is_plain(page[1].set_title("x", loc="left"))


@pytest.mark.parametrize("change", [{"linespacing": 2}, {"multialignment": "right"}, {"family": "monospace"}])
def test_a_kept_text_is_not_taken_for_one_in_another_look(page, change):
    said = "one\ntwo words"
    before = both(page, said=said)[1]
    plain, ours, _ = both(page, said=said, **change)
    assert np.abs(plain - ours).max() <= 1 and (ours != before).any()


def test_letters_follow_the_family_that_is_set(page):
    before = both(page)[1]
    with matplotlib.rc_context({"font.sans-serif": ["DejaVu Serif"]}):
        plain, ours, _ = both(page)
    assert np.abs(plain - ours).max() <= 1 and (ours != before).any()


def test_few_are_kept(monkeypatch):
    monkeypatch.setattr(lettering, "KEPT", 2)
    values = {}
    for key in "abaca":
        assert lettering._kept(values, key, key.upper) == key.upper()
    assert list(values) == ["c", "a"]


def test_a_text_that_an_edge_cuts_has_all_its_letters_elsewhere(page):
    """Both anchors lie at the same fraction of a pixel, so the look is the same."""
    _, ax, _ = page
    ax.set_position([0, 0, 1, 1])  # 288 x 144 pixels
    both(page, said="look", x=280 / 288, y=0.5)
    plain, ours, _ = both(page, said="look", x=28 / 288, y=0.5)
    assert np.abs(plain - ours).max() <= 1
    both(page, said="look", x=280 / 288, y=0.5)  # and what is whole may be cut
