"""Judges of a tournament: which of two answers to a question is better?

In: a Question and two texts, in the order in which they are read. Out: a verdict of games.VERDICTS. A judge is any
callable (question, answer_a, answer_b) -> verdict; its `name` goes into the file of the games.

    ReferenceJudge()                        the answer with the higher ROUGE-L to what a person wrote
    LogProbabilityJudge(model, tokenizer)   the answer that a model finds likelier
    always_first                            broken on purpose, for diagnosis.py to unmask

The authors of QLoRA asked GPT-4 (section 5.2), which no notebook can replay. These two need no one else's server, and
each has a bias that is easy to name: ROUGE-L counts words and not truth, and a model likes what it would say itself.
Not here: asking a judge, and recording one that fails (play.py).
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_lab.data.examples import Example
from qlora_lab.measure.rouge import rouge_l

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase as Tokenizer


def check_name(what: str, name: object) -> None:
    """Raise ValueError unless `name`, of a question or a system, is a text that is not empty."""
    # A number would be written, and refused only when the file is read again: its rows must hold texts.
    if not (isinstance(name, str) and name.strip()):
        raise ValueError(f"{what} is {name!r}: give a text that is not empty")


@dataclass(frozen=True)
class Question:
    """A question to all systems. reference: the answer that a person gave; empty if there is none.

    Raises ValueError for an id that is empty or no text.
    """

    id: str
    prompt: str
    reference: str = ""

    def __post_init__(self) -> None:
        check_name("a question's id", self.id)

    def answered(self, answer: str) -> Example:
        """Return the conversation of this question and an answer. Raises ValueError for a text that is not UTF-8."""
        return Example((("user", self.prompt), ("assistant", answer)))


Judge = Callable[[Question, str, str], str]


def questions_of(examples: Iterable[Example]) -> list[Question]:
    """Make questions of examples with one question each, named by a checksum: the same text is the same question.

    Raises ValueError for a conversation of more turns.
    """
    questions = []
    for example in examples:
        if [role for role, _ in example.messages] != ["user", "assistant"]:
            roles = ", ".join(role for role, _ in example.messages)
            raise ValueError(f"a conversation has the turns {roles}: a tournament takes one question and its answer")
        prompt = example.messages[0][1]
        questions.append(Question(hashlib.sha256(prompt.encode()).hexdigest()[:12], prompt, example.answer))
    return questions


def judge_name(judge: Judge) -> str:
    """Return what a file of games calls a judge: its `name`, or the name of the function or class.

    A file tells judges apart by this name alone, so give a judge that you change another one.
    """
    return str(getattr(judge, "name", None) or getattr(judge, "__name__", None) or type(judge).__name__)


def always_first(question: Question, answer_a: str, answer_b: str) -> str:
    """Prefer the answer that is read first, whatever it says."""
    return "first"


always_first.name = "always-first"


class ReferenceJudge:
    """Prefer the answer with the higher ROUGE-L to the reference. Equal scores tie."""

    name = "rouge"  # in the file of games; a judge with a tolerance would need another

    def __call__(self, question: Question, answer_a: str, answer_b: str) -> str:
        """Judge. Raises ValueError for a question without a reference."""
        if not question.reference:
            raise ValueError(f"question {question.id} has no reference: add one, or take another judge")
        return _higher(*rouge_l([answer_a, answer_b], [question.reference] * 2))


class LogProbabilityJudge:
    """Prefer the answer to which a model gives the higher log-probability, with the token that ends it.

    per_token: divide by the number of tokens. The sum falls with every token, so it prefers short answers; the mean
    forgives length, and an empty answer is then just one token, "the end".
    An answer costs one forward pass, is read alone and its score is kept, so equal texts tie exactly in either order.
    """

    def __init__(self, model: "torch.nn.Module", tokenizer: "Tokenizer", *, per_token: bool = True):
        self.model = model
        self.tokenizer = tokenizer
        self.per_token = per_token
        # a checksum, because a folder keeps its name while its weights change; 0.1 s for SmolLM2
        which = f"{getattr(model, 'name_or_path', '') or type(model).__name__}, weights {_weights(model)}"
        self.name = f"log-probability {'per token' if per_token else 'in sum'} by {which}"
        self._scores: dict[tuple[str, str], float] = {}  # (prompt, answer) -> nats

    def __call__(self, question: Question, answer_a: str, answer_b: str) -> str:
        """Judge. Raises ValueError for an answer that cannot be encoded, or whose score is not finite."""
        return _higher(self.score(question, answer_a), self.score(question, answer_b))

    def score(self, question: Question, answer: str) -> float:
        """Return the log-probability in nats: of the answer, or per token of it. Raises as a call does."""
        key = question.prompt, answer
        if key not in self._scores:
            self._scores[key] = self._measured(question, answer)
        return self._scores[key]

    def _measured(self, question: Question, answer: str) -> float:
        from qlora_lab.data.labels import encode
        from qlora_lab.train.limits import check_length, check_tokens, used_tokens
        from qlora_lab.train.loss import summed_loss

        encoded = encode(question.answered(answer), self.tokenizer)
        check_tokens(self.model, self.tokenizer, used_tokens([encoded]))
        check_length(self.model, len(encoded.input_ids), "a question with its answer", "take shorter ones")
        loss, tokens = summed_loss(self.model, [encoded], progress=False)  # nats; the end token counts
        score = -loss / tokens if self.per_token else -loss
        if not math.isfinite(score):
            raise ValueError(f"the log-probability is {score}: load the judge in float32")
        return score


def _weights(model: "torch.nn.Module") -> str:
    """Return the start of a checksum of all weights: those that base_checksum reads, and those that learn."""
    import torch

    from qlora_lab.train.identity import base_checksum

    digest = hashlib.sha256(base_checksum(model).encode())
    for parameter in model.parameters():
        if parameter.requires_grad:  # of an adapter
            flat = parameter.detach().reshape(-1).contiguous().cpu()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def _higher(score_a: float, score_b: float) -> str:
    """Return the verdict of two scores."""
    return "tie" if score_a == score_b else "first" if score_a > score_b else "second"
