"""Judges: what a reference and a model prefer, and that a judge who reads places is unmasked."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from scipy.stats import binomtest
from torch.nn.functional import log_softmax

from qlora_lab.data.dataset import prompt_ids
from qlora_lab.data.examples import Example
from qlora_lab.data.labels import end_token_id
from qlora_lab.measure.agreement import position_bias
from qlora_lab.measure.diagnosis import diagnose_judge
from qlora_lab.measure.games import Games
from qlora_lab.measure.judges import (
    LogProbabilityJudge,
    Question,
    ReferenceJudge,
    always_first,
    judge_name,
    questions_of,
)

QUESTION = Question("q", "What does it do?", "Return the sum of two numbers.")
GOOD, HALF, BAD = "Return the sum of two numbers.", "Return the sum.", "Plot a line."


# ----------------------------------------------------------------------------------------------------------- questions


def test_questions_of_examples_are_named_by_their_text():
    one, other = (Example((("user", text), ("assistant", "four"))) for text in ("2 + 2?", "1 + 3?"))
    a, b, again = questions_of([one, other, one])
    assert a == again and a.id != b.id and (a.prompt, a.reference) == ("2 + 2?", "four")
    assert a.answered("five").messages == (("user", "2 + 2?"), ("assistant", "five"))


def test_a_conversation_of_several_turns_is_no_question():
    example = Example((("system", "be short"), ("user", "2 + 2?"), ("assistant", "four")))
    with pytest.raises(ValueError, match="has the turns system, user, assistant: a tournament takes one question"):
        questions_of([example])


# -------------------------------------------------------------------------------------------------------- by reference


@pytest.mark.parametrize(
    "a, b, verdict", [(GOOD, BAD, "first"), (BAD, GOOD, "second"), (BAD, BAD, "tie"), ("", "Draw.", "tie")]
)
def test_the_answer_nearer_to_the_reference_wins(a, b, verdict):
    assert ReferenceJudge()(QUESTION, a, b) == verdict


def test_a_difference_up_to_the_margin_is_a_tie():
    # F-measures by hand: 1 for GOOD; 3 of 6 words for HALF, all of its own: 2 * 1 * 0.5 / 1.5 = 2/3
    difference = 1 - 2 / 3
    assert ReferenceJudge(difference + 1e-9)(QUESTION, GOOD, HALF) == "tie"
    assert ReferenceJudge(difference - 1e-9)(QUESTION, GOOD, HALF) == "first"


@pytest.mark.parametrize("margin", [-0.1, 1, math.nan, "0.1", True])
def test_a_margin_that_is_not_allowed(margin):
    with pytest.raises(ValueError, match="margin=.* is not allowed: it is a number from 0 to below 1"):
        ReferenceJudge(margin)


def test_a_question_without_a_reference_cannot_be_judged_by_it():
    with pytest.raises(ValueError, match="question q has no reference"):
        ReferenceJudge()(Question("q", "why?"), "a", "b")


# -------------------------------------------------------------------------------------------------- by log-probability


@pytest.fixture
def judge(tiny_llama, tokenizer):
    return LogProbabilityJudge(tiny_llama, tokenizer, per_token=False)


def by_hand(model, tokenizer, answer):
    """Log-probabilities of the answer's tokens and its end, one forward pass, token by token."""
    prompt = prompt_ids((("user", QUESTION.prompt),), tokenizer)
    ids = [*prompt, *tokenizer(answer, add_special_tokens=False)["input_ids"], end_token_id(tokenizer)]
    with torch.no_grad():
        rows = log_softmax(model(torch.tensor([ids])).logits[0].float(), dim=-1)
    return [rows[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]


@pytest.mark.parametrize("answer", [GOOD, BAD, ""])
def test_a_score_is_the_log_probability_of_answer_and_end(tiny_llama, tokenizer, judge, answer):
    want = by_hand(tiny_llama.eval(), tokenizer, answer)
    # sums of float32 terms in another order
    assert judge.score(QUESTION, answer) == pytest.approx(sum(want), rel=1e-5)
    mean = LogProbabilityJudge(tiny_llama, tokenizer).score(QUESTION, answer)
    assert mean == pytest.approx(sum(want) / len(want), rel=1e-5)


def test_the_sum_prefers_a_short_answer_and_the_mean_need_not(tiny_llama, tokenizer, judge, monkeypatch):
    scores = {"short": (-6.0, 2), "long answer": (-10.0, 5)}  # nats, tokens: -3 and -2 per token
    monkeypatch.setattr("qlora_lab.train.loss.summed_loss", lambda model, encoded, progress: given.pop())
    for per_token, verdict in ((False, "first"), (True, "second")):
        given = [(-nats, tokens) for nats, tokens in reversed(scores.values())]
        assert LogProbabilityJudge(tiny_llama, tokenizer, per_token=per_token)(QUESTION, *scores) == verdict


def test_an_answer_is_read_once_and_equal_texts_tie(judge, monkeypatch):
    reads = []
    real = judge._measured
    monkeypatch.setattr(judge, "_measured", lambda *given: reads.append(given) or real(*given))
    assert judge(QUESTION, GOOD, GOOD) == "tie"
    opposite = {"first": "second", "second": "first"}
    assert judge(QUESTION, GOOD, BAD) == opposite[judge(QUESTION, BAD, GOOD)]
    assert len(reads) == 2


def test_a_score_that_is_not_finite_is_an_error(tiny_llama, tokenizer, judge):
    tiny_llama.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="the log-probability is nan: load the judge in float32"):
        judge(QUESTION, GOOD, BAD)


def test_the_name_of_a_judge_tells_its_settings_and_weights(tiny_llama, tokenizer, judge):
    names = [judge.name, LogProbabilityJudge(tiny_llama, tokenizer).name]
    tiny_llama.lm_head.weight.data[0, 0] += 1
    names += [LogProbabilityJudge(tiny_llama, tokenizer).name, ReferenceJudge().name, ReferenceJudge(0.1).name]
    assert len(set(names)) == 5
    assert judge_name(always_first) == "always-first" and judge_name(by_hand) == "by_hand"


# ------------------------------------------------------------------------------------------------------------ diagnosis


def played(judge, questions=4, systems="abc"):
    """Games of texts "a", "b", "c" in both orders."""
    rows = [
        (f"q{q}", first, second, judge(q, first, second))
        for q in range(questions)
        for first in systems
        for second in systems
        if first != second
    ]
    return Games.of(rows)


def by_text(q, first, second):
    return "first" if first < second else "second"


def test_a_judge_who_reads_places_is_unmasked():
    found = diagnose_judge(played(always_first))
    assert (found.verdicts.first, found.verdicts.second, found.pairs, found.contradictions) == (24, 0, 12, 12)
    assert found.is_broken and str(found).endswith("this judge reads positions, not answers")
    assert "the first answer won 100% of 24 decided games, and 12 of 12 pairs changed their winner" in str(found)
    last = diagnose_judge(played(lambda *_: "second"))
    assert last.is_broken and last.verdicts.share == 0


def test_one_who_reads_answers_is_not():
    found = diagnose_judge(played(by_text))
    assert (found.verdicts.share, found.contradictions, found.p) == (0.5, 0, 1.0) and not found.is_broken
    assert str(found).endswith("no liking for a place was seen")


def test_one_who_favours_a_place_but_reads():
    """He gives the first answer a bonus that decides between neighbours alone."""
    found = diagnose_judge(played(lambda q, a, b: "first" if ord(a) - ord(b) < 2 else "second", systems="abcdef"))
    assert not found.is_broken and found.p < 1e-5 and found.contradictions == 4 * 5  # neighbours, on four questions
    assert str(found).endswith("favours the first answer, so only games in both orders are fair")


def test_few_games_accuse_nobody():
    found = diagnose_judge(played(always_first, questions=1))
    assert found.contradictions == 3 and found.p == pytest.approx(0.25) and not found.is_broken


def test_a_judge_who_throws_a_coin_is_not_accused_of_places():
    coin = np.random.default_rng(0)
    found = diagnose_judge(played(lambda *_: ("first", "second")[coin.integers(2)], questions=200))
    assert found.contradictions / found.pairs == pytest.approx(0.5, abs=0.06)  # 600 pairs: three standard deviations
    assert not found.is_broken


def test_a_win_beside_a_tie_leans_and_unread_games_make_no_pair():
    rows = [("q1", "a", "b", "first"), ("q1", "b", "a", "tie"), ("q2", "a", "b", "first"), ("q2", "b", "a", "unread")]
    found = diagnose_judge(Games.of(rows))
    assert (found.pairs, found.contradictions, found.to_first, found.to_second, found.verdicts.unread) == (
        1,
        0,
        1,
        0,
        1,
    )


@pytest.mark.parametrize(
    "rows, said",
    [
        ([("q", "a", "b", "unread")], "no verdict could be read"),
        ([("q", "a", "b", "tie"), ("q", "b", "a", "tie")], "every verdict is a tie: this judge tells nothing"),
        ([("q", "a", "b", "first")], "no two answers were read in both orders, so place and strength cannot"),
    ],
)
def test_games_that_say_nothing_of_places(rows, said):
    assert said in str(diagnose_judge(Games.of(rows)))


def test_counts_without_questions_are_judged_by_single_games():
    n = 40
    arrays = np.full(n, -1), np.arange(n) % 2, 1 - np.arange(n) % 2, np.zeros(n, dtype=np.int64)
    found = diagnose_judge(Games(("a", "b"), (), *arrays))
    assert found.pairs == 0 and found.p == pytest.approx(binomtest(0, n).pvalue)
    assert "with as many games in either order" in str(found) and "favours the first answer" in str(found)
    one_order = diagnose_judge(Games(("a", "b"), (), arrays[0], 0 * arrays[1], 0 * arrays[1] + 1, arrays[3]))
    assert one_order.p is None and "cannot be told apart" in str(one_order)


@given(st.lists(st.sampled_from(["first", "second", "tie", "unread"]), min_size=2, max_size=30))
def test_swapping_the_places_mirrors_the_diagnosis(verdicts):
    mirror = {"first": "second", "second": "first"}
    rows = [(f"q{i // 2}", *("ab" if i % 2 else "ba"), verdict) for i, verdict in enumerate(verdicts)]
    a = diagnose_judge(Games.of(rows))
    b = diagnose_judge(Games.of((*row[:3], mirror.get(row[3], row[3])) for row in rows))
    assert (a.verdicts.first, a.to_first, a.pairs, a.contradictions, a.p) == (
        b.verdicts.second,
        b.to_second,
        b.pairs,
        b.contradictions,
        b.p,
    )
    if leaning := a.to_first + a.to_second:
        assert a.p == pytest.approx(binomtest(a.to_first, leaning).pvalue)


def test_pairs_are_those_of_position_bias():
    """Both count the answers that were read in both orders."""
    coin = np.random.default_rng(0)
    games = played(lambda *_: ("first", "second", "tie", "unread")[coin.integers(4)], questions=50)
    assert diagnose_judge(games).pairs == position_bias(games).repeated > 50
