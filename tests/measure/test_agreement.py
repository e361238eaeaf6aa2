"""What judges do: positions, agreement. Coefficients equal published or hand-worked ones."""

import numpy as np
import pytest

from qlora_lab.files.course import course_path
from qlora_lab.measure.agreement import FirstWins, fleiss_kappa, judge_agreement, position_bias, rank_agreement
from qlora_lab.measure.games import Games
from qlora_lab.measure.judgments import read_games

# The worked example of Wikipedia's article on Fleiss' kappa: 14 raters, 10 subjects, 5 categories; kappa = 0.210
EXAMPLE = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1]]
EXAMPLE += [[7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]


def both(question: str, first_order: str, second_order: str) -> list[tuple[str, str, str, str]]:
    return [(question, "a", "b", first_order), (question, "b", "a", second_order)]


def test_the_authors_judge_prefers_the_first_answer():
    bias = position_bias(read_games(course_path("data", "published", "guanaco_vicuna_pairs.csv")))
    assert bias.total == FirstWins(2512, 1355, 600, 13) and bias.total.share == pytest.approx(0.650, abs=5e-4)
    assert len(bias.by_pair) == 28
    # rows "13b-guanaco,33b-guanaco,40,27,13,0" and "33b-guanaco,13b-guanaco,56,10,14,0" of the file
    assert bias.by_pair["13b-guanaco", "33b-guanaco"] == FirstWins(96, 37, 27, 0)


def test_without_a_decided_game_there_is_no_share():
    assert position_bias(Games.of([("q", "a", "b", "tie")])).total.share is None


def test_ranks_agree_as_counted_by_hand():
    # of the 6 pairs of a, b, c, d one is turned: tau = (5 - 1) / 6; rho = 1 - 6 (1 + 1) / (4 * 15)
    found = rank_agreement({"a": 4, "b": 3, "c": 2, "d": 1, "x": 0}, {"d": -9, "a": 7, "c": 3, "b": 2})
    assert found.kendall == pytest.approx(4 / 6) and found.spearman == pytest.approx(0.8)


def test_the_paper_s_tau_comes_out_of_its_table_without_the_judge_itself():
    # QLoRA, table 7: Elo by people and by GPT-4. Section 5 prints tau = 0.43: that of the seven systems besides GPT-4.
    # Of all eight, six pairs of 28 are turned, so tau is 16 / 28. The printed rho of 0.55 is that of neither.
    people = {"65b": 1023, "33b": 1009, "chatgpt": 916, "vicuna": 984, "13b": 975, "7b": 1010, "bard": 909}
    judge = {"65b": 1022, "33b": 992, "chatgpt": 966, "vicuna": 974, "13b": 913, "7b": 879, "bard": 902}
    without = rank_agreement(people, judge)
    assert without.kendall == pytest.approx(0.43, abs=5e-3) and without.spearman == pytest.approx(0.43, abs=5e-3)
    everyone = rank_agreement(people | {"gpt-4": 1176}, judge | {"gpt-4": 1348})
    assert everyone.kendall == pytest.approx(16 / 28) and everyone.spearman == pytest.approx(0.62, abs=5e-3)


def test_kappa_is_the_published_one():
    assert fleiss_kappa(np.array(EXAMPLE)) == pytest.approx(0.210, abs=5e-4)


@pytest.mark.parametrize(
    ("counts", "kappa"), [([[2, 0], [0, 2]], 1), ([[1, 1], [1, 1]], -1), ([[2, 0], [1, 1]], -1 / 3)]
)
def test_kappa_at_its_ends(counts, kappa):
    # the last: P = 1/2, and by chance (3/4)^2 + (1/4)^2 = 5/8, so (1/2 - 5/8) / (3/8)
    assert fleiss_kappa(np.array(counts)) == pytest.approx(kappa)


def test_judges_are_compared_on_what_all_of_them_read():
    ours = Games.of([*both("q1", "first", "second"), *both("q2", "tie", "unread")])
    theirs = Games.of([("q2", "a", "b", "tie"), *both("q1", "first", "second"), ("q9", "a", "b", "tie")])
    found = judge_agreement([ours, theirs])
    assert found.kappa == 1 and (found.games, found.left_out) == (3, 2)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: rank_agreement({"a": 1}, {"a": 1, "b": 2}), "1 systems are in both tables, but ranks need at least 2"),
        (lambda: rank_agreement({"a": 1, "b": 1}, {"a": 1, "b": 2}), "gives a, b one rating"),
        (lambda: fleiss_kappa(np.array([[2, 0], [1, 2]])), "there are 2 to 3 verdicts a game"),
        (lambda: fleiss_kappa(np.zeros((0, 3))), "there are none a game"),
        (lambda: fleiss_kappa(np.array([[2, 0], [2, 0]])), "all verdicts are in one category"),
        (lambda: judge_agreement([Games.of(both("q", "tie", "tie"))]), "at least two judges"),
        (lambda: judge_agreement([Games.of_counts([("a", "b", (1, 0, 0, 0))])] * 2), "counts alone have none"),
        (
            lambda: judge_agreement([Games.of(both(question, "tie", "first")) for question in "qr"]),
            "no game in common",
        ),
        (
            lambda: judge_agreement([Games.of([("q", "a", "b", "tie"), ("q", "a", "b", "first")])] * 2),
            "'a' against 'b' on question 'q' was judged twice by one judge: keep one verdict",
        ),
    ],
)
def test_errors_say_what_to_do(act, words):
    with pytest.raises(ValueError, match=words):
        act()
