"""Rules that read no question: what each scores on questions that are worked by hand."""

import pytest

from qlora_lab.data.choice_baselines import baselines, content_words, stems
from qlora_lab.data.choice_files import ChoiceQuestion, Questions


def made(*questions: ChoiceQuestion) -> Questions:
    return Questions("made", questions, {})


def test_each_rule_by_hand():
    code = "def get_width(self):\n    return self.pixels"
    options = ("Widths in pixels.", "Get it.", "Pixels, as many as this picture has.", "Nothing.")
    found = baselines(made(ChoiceQuestion("x", code, options, 0)))
    # 17, 7, 36 and 8 characters have the mean 17; "Widths" has the stem of "width", but is another word
    assert found == {
        "longest": 0,
        "shortest": 0,
        "nearest to the mean length": 1,
        "most shared words": pytest.approx(1 / 3),  # "pixels", "get", "pixels": three are equal
        "most shared stems": 1,
        "rarest shared stems": 1,
        "the name's stems": 0.5,  # "width" and "get"
    }


def test_a_rule_that_sees_no_difference_guesses():
    assert set(baselines(made(ChoiceQuestion("x", "?", tuple("abcd"), 2))).values()) == {0.25}


def test_a_rare_word_outweighs_two_that_every_option_has():
    common = [ChoiceQuestion("x", "?", ("the axis line", "an axis line", "axis line", "line of axis"), 0)] * 20
    asked = ChoiceQuestion("x", "def f(axis, line, kurtosis)", ("axis line", "kurtosis", "one", "two"), 1)
    found = baselines(made(*common, asked))
    assert found["rarest shared stems"] == pytest.approx((20 * 0.25 + 1) / 21)
    assert found["most shared stems"] == pytest.approx((20 * 0.25 + 0) / 21)


def test_words_of_code_are_parted():
    assert content_words("setXLim(max_value2)") == {"set", "xlim", "max", "value2"}
    assert stems("normalised norms") == stems("Normalize") == {"norm"}


def test_whole_prompts_have_no_options():
    with pytest.raises(ValueError, match="made holds whole prompts: baselines need the options"):
        baselines(made(ChoiceQuestion("x", "", (), 0, "Which?\nAnswer:")))
