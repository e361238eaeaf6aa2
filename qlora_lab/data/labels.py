"""Labels: the mask of the loss, which decides what is learned from one conversation.

In: an example, the tokenizer. Out: input_ids and labels. A label is the token itself where it is learned, and -100,
which cross_entropy ignores, where it is not.

The model learns the answers and the token that ends each answer, nothing else. Without that token among its labels it
would never learn to stop. If the template marks what is generated, exactly that is learned, as in transformers.

Not here: where an answer stands (chat_template.py); tokens of a text (tokens.py); data sets and batches (dataset.py).
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from qlora_lab.data.chat_template import Answer, ChatTemplate, Span, ends
from qlora_lab.data.examples import Example, Turns
from qlora_lab.data.tokens import Tokens, encode_messages_as_text, end_prompt_at, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORED = -100  # the ignore_index of torch.nn.functional.cross_entropy
# Which token ends an answer depends on the template alone, so any conversation shows it.
PROBE = Example((("user", "2 + 2?"), ("assistant", "4")))


@dataclass(frozen=True)
class Notes:
    """What encoding came across, counted in one example or summed over many."""

    empty: int = 0  # answers without text: the end token alone is learned
    hidden: int = 0  # earlier answers that the template does not show whole: not learned
    shortened: int = 0  # last answers that it does not show whole: only what it shows is learned
    control_texts: int = 0  # control tokens in texts, encoded as text

    def warnings(self) -> list[str]:
        """Return a line for each count that means less is learned than the records hold."""
        lines = []
        if self.empty:
            lines.append(f"{_are(self.empty, 'answer')} empty: the model learns to say nothing; leave such records out")
        if self.hidden:
            earlier = _are(self.hidden, "earlier answer")
            lines.append(f"{earlier} not shown whole by the chat template, and not learned")
        if self.shortened:
            last = _are(self.shortened, "last answer")
            lines.append(f"{last} not shown whole by the chat template: only what it shows is learned")
        return lines

    def __add__(self, other: "Notes") -> "Notes":
        return Notes(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Encoded:
    """One example in tokens."""

    input_ids: list[int]
    labels: list[int]  # as many: the id again where it is learned, IGNORED elsewhere
    notes: Notes = field(default=Notes(), compare=False, repr=False)

    @property
    def answer_tokens(self) -> int:
        """Number of tokens that are learned."""
        return sum(label != IGNORED for label in self.labels[1:])  # nothing comes before the first, to predict it from


def _are(count: int, noun: str) -> str:
    return f"{count:,} {noun} is" if count == 1 else f"{count:,} {noun}s are"


def prompt_ids(messages: Turns, tokenizer: "Tokenizer", clock: datetime | None = None) -> list[int]:
    """Return the tokens that a model gets before it answers: the conversation so far and the opening of an answer.

    clock: the time that a template writes; None: now. Raises ValueError for what the template or tokenizer refuses.
    """
    template = ChatTemplate(tokenizer, clock)  # reads the template once
    tokens = tokenise(template.render(messages, opens_answer=True), tokenizer)
    if template.is_spelt_in(messages):
        encode_messages_as_text(tokens, messages, template.places(messages, tokens.text, opens_answer=True), template)
    return tokens.ids


def encode(example: Example, tokenizer: "Tokenizer", clock: datetime | None = None) -> Encoded:
    """Encode a conversation by the tokenizer's chat template (or PLAIN_TEMPLATE); label answers and their end tokens.

    clock: the time that a template writes; None: now. Raises ValueError, with the example's place if it is known, when
    the template refuses the conversation, hides its last answer, or ends an answer without a special token.
    """
    return encode_within(example, ChatTemplate(tokenizer, clock), None)


def encode_within(example: Example, template: ChatTemplate, max_length: int | None) -> Encoded | int:
    """Do what `encode` does, but for more than `max_length` tokens return just their number: far less work."""
    try:
        return _encode(example, template, max_length)
    except ValueError as error:
        if not example.place:
            raise
        raise ValueError(f"{example.place}: {error}") from error


def end_token_id(tokenizer: "Tokenizer") -> int:
    """Return the token that ends an answer under the tokenizer's template, at which generation must stop.

    It may differ from tokenizer.eos_token_id: a chat template can end turns with a token of its own.
    """
    template = ChatTemplate(tokenizer)
    return [label for label in encode_within(PROBE, template, None).labels if label in template.control_names][-1]


def _encode(example: Example, template: ChatTemplate, max_length: int | None) -> Encoded | int:
    turns = example.messages
    tokens = tokenise(template.render(turns), template.tokenizer)
    if max_length is not None and len(tokens.ids) > max_length:
        return len(tokens.ids)
    places = template.places(turns, tokens.text)
    spelt = template.is_spelt_in(turns)  # text that looks like a control token must not act as one
    control_texts = encode_messages_as_text(tokens, turns, places, template) if spelt else 0
    closed = ends(turns, places)  # turn -> where its content ends
    learned = _learned(example, template.answers(turns, tokens.text, closed))
    for answer in learned.values():
        for place in answer.openings:
            end_prompt_at(tokens, place, template)  # else a token could span question and answer
    if max_length is not None and len(tokens.ids) > max_length:  # control tokens that became text are now more tokens
        return len(tokens.ids)
    # The mask of the loss: learn only the answers and their end tokens.
    labels = [IGNORED] * len(tokens.ids)
    for start, stop in _learned_spans(learned, turns, tokens, closed.get(len(turns) - 2), template.control_names):
        positions = tokens.within(start, stop)  # a slice of tokens
        labels[positions] = tokens.ids[positions]
    return Encoded(tokens.ids, labels, _notes(example, learned, control_texts))


def _learned(example: Example, answers: dict[int, Answer]) -> dict[int, Answer]:
    """Select the answers that are learned: the last one, and earlier ones that are shown whole."""
    last = len(example.messages) - 1  # always an answer
    if last not in answers:
        raise ValueError(f"the chat template does not show the answer {example.answer[:60]!r}: use another template")
    wanted = {i: answer for i, answer in answers.items() if i not in example.not_learned}
    return {i: answer for i, answer in wanted.items() if answer.whole or i == last}


def _notes(example: Example, learned: dict[int, Answer], control_texts: int) -> Notes:
    empty = sum(not example.messages[i][1].strip() for i in learned)
    answers = sum(role == "assistant" for role, _ in example.messages) - len(example.not_learned)
    return Notes(empty, answers - len(learned), sum(not answer.whole for answer in learned.values()), control_texts)


def _learned_spans(
    learned: dict[int, Answer], turns: Turns, tokens: Tokens, question_end: int | None, control: dict[int, str]
) -> list[Span]:
    """Return the span of each answer with its end token.

    A control token after an answer ends it if the last answer ends with it too, or if this token and the next are the
    two that follow a question. In a template that ends no turn, the next header's token is neither.
    """
    last_end, _ = _ending(tokens, learned[len(turns) - 1].stop, control)
    closing = _ending(tokens, question_end, control)
    spans = []  # characters of the text
    for i, answer in learned.items():
        end, following = _ending(tokens, answer.stop, control)
        ends_it = end is not None and (end == last_end or (following is not None and (end, following) == closing))
        stop = tokens.stops[tokens.control_after(answer.stop, control)] if ends_it else None
        if stop is None or (answer.generated and answer.generated[1] < stop):
            within = " in its {% generation %} block" if answer.generated else ""
            raise ValueError(
                f"the chat template ends {turns[i][1][:60]!r} without a special token{within}, so the model would "
                "never stop: use another template"
            )
        spans.append(answer.generated or (answer.start, stop))
    return spans


def _ending(tokens: Tokens, place: int | None, control: dict[int, str]) -> tuple[int | None, int | None]:
    """Return the control token after the content that ends at `place`, and the one after it; None if text is first."""
    first = None if place is None else tokens.control_after(place, control)
    if first is None:
        return None, None
    second = tokens.control_after(tokens.stops[first], control)
    return tokens.ids[first], None if second is None else tokens.ids[second]
