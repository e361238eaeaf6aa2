"""An exam and conversations of the same models: the two take-aways of the slides, as far as they hold."""

import pytest

from qlora_lab.measure.published import Chatbot, published
from qlora_lab.show.results import exam_and_chat

MODELS = {(model.data, model.size): model for model in exam_and_chat()}


def test_eight_data_sets_in_four_sizes():
    assert len(MODELS) == len(exam_and_chat()) == 32
    assert {size for _, size in MODELS} == {"7B", "13B", "33B", "65B"}


def test_what_table_6_prints_of_them():
    """To 0.1, so no data set has the judgments of another."""
    printed = [row for row in published("chatgpt.csv", Chatbot) if (row.system, row.size) in MODELS]
    assert len(printed) == 17  # 8 of 13B, 3 of each other size
    for row in printed:
        assert MODELS[row.system, row.size].chatgpt == pytest.approx(float(row.mean), abs=0.05)


def test_flan_is_best_in_the_exam_and_worst_in_conversation_but_once():
    for size in ("7B", "13B", "33B", "65B"):
        group = [model for model in MODELS.values() if model.size == size]
        assert max(group, key=lambda model: model.mmlu).data == "FLAN v2"
        worst = min(group, key=lambda model: model.chatgpt).data
        assert worst == ("Longform" if size == "7B" else "FLAN v2")
