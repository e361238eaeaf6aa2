"""Judges: what a reference and a model prefer."""

import math

import pytest
import torch
from torch.nn.functional import log_softmax

from qlora_lab.data.dataset import prompt_ids
from qlora_lab.data.examples import Example
from qlora_lab.data.labels import end_token_id
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
    "a, b, verdict",
    [(GOOD, BAD, "first"), (BAD, GOOD, "second"), (GOOD, HALF, "first"), (BAD, BAD, "tie"), ("", "Draw.", "tie")],
)
def test_the_answer_nearer_to_the_reference_wins(a, b, verdict):
    assert ReferenceJudge()(QUESTION, a, b) == verdict


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
    names += [LogProbabilityJudge(tiny_llama, tokenizer).name, ReferenceJudge().name]
    assert len(set(names)) == 4
    assert judge_name(always_first) == "always-first" and judge_name(by_hand) == "by_hand"
