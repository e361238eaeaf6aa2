"""Labels: the mask of the loss, which decides what is learned from one conversation.

In: an example, the tokenizer. Out: input_ids and labels. A label is the token itself where it is learned, and -100,
which cross_entropy ignores, where it is not.

The model learns the answers and the token that ends each answer, nothing else. Without that token among its labels it
would never learn to stop. If the template marks what is generated, exactly that is learned, as in transformers.

Not here: where an answer stands (chat_template.py); tokens of a text (tokens.py); data sets and batches (dataset.py).
"""

from bisect import bisect_left
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from qlora_lab.data.chat_template import Answer, ChatTemplate, Span, ends
from qlora_lab.data.examples import Example, Turns
from qlora_lab.data.pictures import Picture, expanded
from qlora_lab.data.tokens import Tokens, encode_messages_as_text, end_prompt_at, tokenise
from qlora_lab.data.tool_calls import Parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

NO_PARTS = Parts()
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
    pictures: tuple[Picture, ...] = ()

    @property
    def answer_tokens(self) -> int:
        """Number of tokens that are learned."""
        return sum(label != IGNORED for label in self.labels[1:])  # nothing comes before the first, to predict it from


def _are(count: int, noun: str) -> str:
    return f"{count:,} {noun} is" if count == 1 else f"{count:,} {noun}s are"


def prompt_ids(
    messages: Turns, tokenizer: "Tokenizer", clock: datetime | None = None, parts: Parts = NO_PARTS
) -> list[int]:
    """Return the tokens that a model gets before it answers: the conversation so far and the opening of an answer.

    clock: the time that a template writes; None: now. parts: those of the messages (Example.parts).
    Raises ValueError for what the template or tokenizer refuses.
    """
    template = ChatTemplate(tokenizer, clock, parts)  # reads the template once
    tokens = tokenise(template.render(messages, opens_answer=True), tokenizer)
    if template.is_spelt_in(messages):
        encode_messages_as_text(tokens, messages, template.places(messages, tokens.text, opens_answer=True), template)
    return tokens.ids


class Prompt(NamedTuple):
    """What a model gets before it answers."""

    ids: list[int]  # tokens
    pictures: tuple[Picture, ...] = ()


def prompt_of(example: Example, tokenizer: "Tokenizer") -> Prompt:
    """Return what a model gets before the last answer of `example`. Raises what prompt_ids and encode raise."""
    turns, pictures, marks = expanded(example.prompt, example.pictures, tokenizer)
    if not pictures:
        return Prompt(prompt_ids(turns, tokenizer, parts=example.parts))
    template = ChatTemplate(tokenizer, None, example.parts, marks)
    _check_unspelt(turns, template)
    return Prompt(tokenise(template.render(turns, opens_answer=True), tokenizer).ids, pictures)


def _check_unspelt(turns: Turns, template: ChatTemplate) -> None:
    """Raise ValueError for a text that spells a control token: encoded anew as text, it would take the marks along."""
    if template.is_spelt_in(turns):
        raise ValueError("a text beside pictures spells a control token: leave it out")


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
    turns, pictures, marks = expanded(example.messages, example.pictures, template.tokenizer)
    example = replace(example, messages=turns, pictures=()) if pictures else example
    template = template.of(example.parts, marks)
    tokens = tokenise(template.render(turns), template.tokenizer)
    if max_length is not None and len(tokens.ids) > max_length:
        return len(tokens.ids)
    places = template.places(turns, tokens.text)
    spelt = template.is_spelt_in(turns)  # text that looks like a control token must not act as one
    if pictures:
        _check_unspelt(turns, template)
    control_texts = encode_messages_as_text(tokens, turns, places, template) if spelt else 0
    hidden = template.hidden_thoughts(turns, places)
    closed = ends(turns, places, example.parts.calling)  # turn -> where its content ends
    answers = template.answers(turns, tokens.text, closed)
    learned = _learned(example, {i: answer for i, answer in answers.items() if i not in hidden})
    _check_shown(turns, closed)
    for answer in learned.values():
        for place in answer.openings:
            end_prompt_at(tokens, place, template)  # else a token could span question and answer
    if max_length is not None and len(tokens.ids) > max_length:  # control tokens that became text are now more tokens
        return len(tokens.ids)
    # The mask of the loss: learn only the answers and their end tokens.
    labels = [IGNORED] * len(tokens.ids)
    for start, stop in _learned_spans(example, learned, tokens, closed, template.control_names):
        positions = tokens.within(start, stop)  # a slice of tokens
        labels[positions] = tokens.ids[positions]
    return Encoded(tokens.ids, labels, _notes(example, learned, control_texts), pictures)


def _check_shown(turns: Turns, closed: dict[int, int]) -> None:
    """Raise ValueError for a text beside the answers that the template drops without a word."""
    for i, (role, content) in enumerate(turns):
        if role != "assistant" and content.strip() and i not in closed:
            raise ValueError(f"the chat template does not show the {role} turn {content[:60]!r}: use another template")


def _learned(example: Example, answers: dict[int, Answer]) -> dict[int, Answer]:
    """Select the answers that are learned: the last one, and earlier ones that are shown whole."""
    last = len(example.messages) - 1  # always an answer
    if last not in answers:
        raise ValueError(f"the chat template does not show the answer {example.answer[:60]!r}: use another template")
    wanted = {i: answer for i, answer in answers.items() if i not in example.not_learned}
    return {i: answer for i, answer in wanted.items() if answer.whole or i == last}


def _notes(example: Example, learned: dict[int, Answer], control_texts: int) -> Notes:
    empty = sum(not example.messages[i][1].strip() for i in learned if i not in example.parts.calling)
    answers = sum(role == "assistant" for role, _ in example.messages) - len(example.not_learned)
    return Notes(empty, answers - len(learned), sum(not answer.whole for answer in learned.values()), control_texts)


def _learned_spans(
    example: Example, learned: dict[int, Answer], tokens: Tokens, closed: dict[int, int], control: dict[int, str]
) -> list[Span]:
    """Return the span of each answer with its end token.

    A control token after an answer ends it if the last answer ends with it too, or if this token and the next are the
    two that follow a question. In a template that ends no turn, the next header's token is neither.
    """
    last = len(example.messages) - 1
    last_end, _ = _ending(tokens, learned[last].stop, control)  # None behind the texts of a tool call
    closing = _ending(tokens, closed.get(last - 1), control)
    spans = []  # characters of the text
    for i, answer in learned.items():
        end, following = _ending(tokens, answer.stop, control)
        if i in example.parts.calling:
            position = _end_of_calls(tokens, answer.stop, closed.get(i + 1), last_end, control)
        elif end is not None and (end == last_end or (following is not None and (end, following) == closing)):
            position = tokens.control_after(answer.stop, control)
        else:
            position = None
        stop = None if position is None else tokens.stops[position]
        if stop is None or (answer.generated and answer.generated[1] < stop):
            within = " in its {% generation %} block" if answer.generated else ""
            said = example.messages[i][1][:60] or "a tool call"
            advice = "use another template" if i == last else "use another template, or last_answer_only"
            fault = f"without a special token{within}, so the model would never stop"
            raise ValueError(f"the chat template ends {said!r} {fault}: {advice}")
        spans.append(answer.generated or (answer.start, stop))
    return spans


def _end_of_calls(
    tokens: Tokens, stop: int, result: int | None, last_end: int | None, control: dict[int, str]
) -> int | None:
    """Return the position of the token that ends a turn whose last call has its last text before `stop`.

    That is the first that ends the last answer, or else the first control token. result: where the call's result ends;
    None for the last turn, after whose end only control tokens may follow.
    """
    after = range(bisect_left(tokens.starts, stop), len(tokens.ids))
    ending = [i for i in after if (result is None or tokens.starts[i] < result) and tokens.is_control(i, control)]
    if result is None and ending:
        rest = [tokens.text[tokens.starts[i] : tokens.stops[i]] for i in after if i > ending[0] and i not in ending]
        if "".join(rest).strip():
            return None
    return next((i for i in ending if tokens.ids[i] == last_end), next(iter(ending), None))


def _ending(tokens: Tokens, place: int | None, control: dict[int, str]) -> tuple[int | None, int | None]:
    """Return the control token after the content that ends at `place`, and the one after it; None if text is first."""
    first = None if place is None else tokens.control_after(place, control)
    if first is None:
        return None, None
    second = tokens.control_after(tokens.stops[first], control)
    return tokens.ids[first], None if second is None else tokens.ids[second]
