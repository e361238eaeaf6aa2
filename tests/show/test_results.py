"""Pictures of results draw every number, and say it in words."""

import pytest

from qlora_lab.show import results as module
from qlora_lab.show.figure import COLOURS
from qlora_lab.show.results import LOUD, Bar, Tuned, exam_and_chat_picture, intervals, rank_words

BARS = {"NF4": Bar(-0.6, -2.1, 0.9, note="x"), "FP4": Bar(-1.4, -3.0, 0.2, mark=-1.0)}


@pytest.fixture
def drawn(monkeypatch):
    """The figure of a picture, and its alt text."""
    found = []
    monkeypatch.setattr(module, "picture", lambda fig, alt: found.append((fig, alt)))
    return found


def test_intervals_and_their_words(drawn):
    intervals("4 bits", "points", BARS, form="+.1f", zero="16 bits", marked="paper")
    ((fig, alt),) = drawn
    (ax,) = fig.axes
    lines = [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.get_lines()]
    for y, bar in enumerate(BARS.values()):
        assert ([bar.low, bar.high], [y, y]) in lines and ([bar.value], [y]) in lines
    assert ([-1.0], [1]) in lines and ([0, 0], [0, 1]) in lines
    assert ax.get_ylim() == (1.5, -0.5)  # the first row is on top
    assert [text.get_text() for text in ax.get_yticklabels()] == ["NF4", "FP4"]
    assert ax.get_xlabel() == "points; dashed: 16 bits; diamonds: paper"
    said = "4 bits. In points: NF4 -0.6 (-2.1 to +0.9), x; FP4 -1.4 (-3.0 to +0.2), paper -1.0"
    assert alt == said


def test_intervals_without_more(drawn):
    intervals("Ratings", "points", {"a": Bar(1000.4, 980.0, 1021.0)})
    ((fig, alt),) = drawn
    assert alt == "Ratings. In points: a 1000 (980 to 1021)"
    assert fig.axes[0].get_xlabel() == "points" and len(fig.axes[0].get_lines()) == 2


def test_a_long_unit_is_not_cut_off(drawn):
    intervals("Ratings", "points; " + 5 * "a long word; ", {"a": Bar(1.0, 0.0, 2.0)}, marked="paper")
    ((fig, alt),) = drawn
    lines = fig.axes[0].get_xlabel().split("\n")
    assert len(lines) == 2 and max(map(len, lines)) <= 60 and "\n" not in alt


def test_a_mark_at_zero_is_drawn(drawn):
    intervals("x", "points", {"a": Bar(1.0, 0.0, 2.0, mark=0.0)}, marked="paper")
    assert "paper 0" in drawn[0][1] and len(drawn[0][0].axes[0].get_lines()) == 3


def test_exam_and_chat(drawn):
    models = [Tuned("FLAN v2", "7B", 44.5, 44.8), Tuned("FLAN v2", "13B", 51.4, 47.0)]
    models += [Tuned("Guanaco", "7B", 36.6, 87.0), Tuned("Alpaca", "7B", 38.8, 64.4)]
    exam_and_chat_picture(models)
    ((fig, alt),) = drawn
    (ax,) = fig.axes
    points = {(x, y): line.get_color() for line in ax.get_lines() for x, y in zip(*line.get_data(), strict=True)}
    assert points.keys() == {(model.mmlu, model.chatgpt) for model in models}
    assert points[44.5, 44.8] == points[51.4, 47.0] == COLOURS["orange"] != points[36.6, 87.0] == COLOURS["blue"]
    words = [text.get_text() for text in ax.texts]
    assert sorted(words) == sorted(["FLAN v2", "7B", "13B", "Guanaco", "7B"])
    assert ax.get_legend().get_texts()[0].get_text() == "1 other data sets, 7B to 65B"
    assert alt.endswith(
        "FLAN v2 7B 44.5 and 44.8, 13B 51.4 and 47.0; Guanaco 7B 36.6 and 87.0; Alpaca 7B 38.8 and 64.4"
    )


def test_the_loud_ones_are_told_apart_without_colour():
    assert len({mark for _, mark in LOUD.values()}) == len(LOUD) and "o" not in dict(LOUD.values()).values()


def test_texts_are_large_enough(drawn):
    """At 1280 px a picture of 7.5 inches at 144 dpi is shown at its size or a little below: 10 points are 20 px."""
    intervals("x", "points", BARS)
    exam_and_chat_picture([Tuned("FLAN v2", "7B", 44.5, 44.8), Tuned("Alpaca", "7B", 38.8, 64.4)])
    for fig, _ in drawn:
        (ax,) = fig.axes
        texts = [*ax.texts, ax.title, ax.xaxis.label, *ax.get_yticklabels(), *ax.get_xticklabels()]
        assert min(text.get_fontsize() for text in texts if text.get_text()) >= 10


def test_rank_words():
    assert (rank_words((2, 2)), rank_words((3, 5))) == ("rank 2", "ranks 3 to 5")
