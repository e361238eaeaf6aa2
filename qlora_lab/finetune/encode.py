"""Tokens and labels of one conversation.

In: an example, the tokenizer. Out: input_ids, and labels: the token itself where it is learned, -100 where it is not.

Learned are the answers and the token that ends each answer, nothing else: a model that never sees the end token as a
label never stops. Where the template marks what is generated, that is learned, as transformers would.
The text of the whole conversation is tokenised once. Two things are mended in it:
- A text may spell a control token ("what does <|im_end|> do?"): it is encoded as text. As a token it would end a turn.
- A token may hold the end of a prompt and the beginning of an answer (a line break and an indentation). It is split
  there, as generation splits it, which is given the prompt alone.

Not here: where an answer stands (chat_template.py), data sets and batches (data.py).
"""

from bisect import bisect_left
from dataclasses import dataclass, field
from datetime import datetime
from os.path import commonprefix
from typing import TYPE_CHECKING

from qlora_lab.finetune.chat_template import Answer, ChatTemplate, Span
from qlora_lab.finetune.examples import Example, Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

IGNORED = -100  # the ignore_index of torch.nn.functional.cross_entropy
# verbose: not how long a text may be, since those that are too long are left out later
AS_IT_IS = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
PROBE = Example((("user", "2 + 2?"), ("assistant", "4")))  # any conversation shows which token ends an answer


@dataclass(frozen=True)
class Notes:
    """What was met on the way, in one example or summed over many."""

    empty: int = 0  # answers without text: the end token alone is learned
    hidden: int = 0  # answers of earlier turns that the template does not show whole, and that are not learned
    shortened: int = 0  # last answers that it does not show whole: what it shows is learned
    control_texts: int = 0  # control tokens in texts, encoded as text

    def warnings(self) -> list[str]:
        """What changes a lesson without a word, a line each."""
        lines = []
        if self.empty:
            lines.append(f"{self.empty} answers are empty: the model learns to say nothing; leave them out")
        if self.hidden:
            lines.append(
                f"{self.hidden} answers of earlier turns are not shown whole by the chat template, and not learned"
            )
        if self.shortened:
            lines.append(f"{self.shortened} last answers are not shown whole by the chat template: the rest is learned")
        return lines

    def __add__(self, other: "Notes") -> "Notes":
        return Notes(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Encoded:
    """One example in tokens: input_ids and labels, equally long lists of ids."""

    input_ids: list[int]
    labels: list[int]
    notes: Notes = field(default=Notes(), compare=False, repr=False)

    @property
    def answer_tokens(self) -> int:
        """Labels that a model is asked for: the first token of all has nothing before it."""
        return sum(label != IGNORED for label in self.labels[1:])


@dataclass
class _Tokens:
    """ids, and the first and one-past-last character of each."""

    ids: list[int]
    starts: list[int]
    stops: list[int]

    def replace(self, first: int, last: int, ids: list[int], start: int, stop: int) -> None:
        """`ids`, all from `start` to `stop`, in place of the tokens first to last - 1."""
        self.ids[first:last] = ids
        self.starts[first:last] = [start] * len(ids)
        self.stops[first:last] = [stop] * len(ids)


def prompt_ids(messages: Turns, tokenizer: "Tokenizer", clock: datetime | None = None) -> list[int]:
    """The tokens a model is given before it answers: the conversation so far and the opening of an answer.

    clock: the time that a template writes; None for now. Raises ValueError for what the template or tokenizer refuses.
    """
    template = ChatTemplate(tokenizer, clock)
    text = template.render(messages, opens_answer=True)
    tokens = _tokenise(text, tokenizer)
    if _spells_control(messages, template):
        _encode_as_text(
            tokens, text, _contents(messages, text, template.ends(messages, text, True), template), template
        )
    return tokens.ids


def encode(example: Example, tokenizer: "Tokenizer", clock: datetime | None = None) -> Encoded:
    """The conversation through the tokenizer's chat template (or PLAIN_TEMPLATE), answers and end tokens as labels.

    clock: the time that a template writes; None for now. Raises ValueError, with the example's place where it is
    known, if the template refuses the conversation, does not show its last answer, or ends an answer by no token.
    """
    return encode_within(example, ChatTemplate(tokenizer, clock), None)


def encode_within(example: Example, template: ChatTemplate, max_length: int | None) -> Encoded | int:
    """As `encode`; but only the number of tokens if it is above `max_length`, which takes far less time."""
    try:
        return _encode(example, template, max_length)
    except ValueError as error:
        if not example.place:
            raise
        raise ValueError(f"{example.place}: {error}") from error


def end_token_id(tokenizer: "Tokenizer") -> int:
    """The token that ends an answer under the tokenizer's template, which generation must stop at.

    It need not be tokenizer.eos_token_id: a chat template may end turns by a token of its own.
    """
    template = ChatTemplate(tokenizer)
    control = set(template.control.values())
    return [label for label in encode_within(PROBE, template, None).labels if label in control][-1]


def _encode(example: Example, template: ChatTemplate, max_length: int | None) -> Encoded | int:
    turns, text = example.messages, template.render(example.messages)
    tokens = _tokenise(text, template.tokenizer)
    if max_length is not None and len(tokens.ids) > max_length:
        return len(tokens.ids)
    ends, control_texts = template.ends(turns, text), 0
    if _spells_control(turns, template):
        control_texts = _encode_as_text(tokens, text, _contents(turns, text, ends, template), template)
    answers = template.answers(turns, text, ends)
    if len(turns) - 1 not in answers:
        raise ValueError(f"the chat template does not show the answer {example.answer[:60]!r}: use another template")
    learned = {i: a for i, a in answers.items() if i not in example.not_learned and (a.whole or i == len(turns) - 1)}
    for answer in learned.values():
        _split_at(tokens, text, answer.generated[0] if answer.generated else answer.start, template.tokenizer)
    if max_length is not None and len(tokens.ids) > max_length:
        return len(tokens.ids)
    labels = [IGNORED] * len(tokens.ids)
    for start, stop in _learned_spans(learned, turns, text, tokens, dict(ends), template):
        positions = slice(bisect_left(tokens.starts, start), bisect_left(tokens.starts, stop))
        labels[positions] = tokens.ids[positions]
    notes = Notes(
        sum(not turns[i][1].strip() for i in learned),
        sum(role == "assistant" for role, _ in turns) - len(example.not_learned) - len(learned),
        sum(not answer.whole for answer in learned.values()),
        control_texts,
    )
    return Encoded(tokens.ids, labels, notes)


def _learned_spans(
    learned: dict[int, Answer], turns: Turns, text: str, tokens: _Tokens, ends: dict[int, int], template: ChatTemplate
) -> list[Span]:
    """Of each answer and its end token: what may end an answer is what ends the last one, or what ends a question."""
    control, last = set(template.control.values()), len(turns) - 1
    allowed = {_end_id(tokens, text, learned[last].stop, control), _first_control(tokens, ends.get(last - 1), control)}
    spans = []
    for i, answer in learned.items():
        end = _end_position(tokens, text, answer.stop, control)
        stop = None if end is None or tokens.ids[end] not in allowed else tokens.stops[end]
        if stop is None or (answer.generated and answer.generated[1] < stop):
            within = " in its {% generation %} block" if answer.generated else ""
            raise ValueError(
                f"the chat template ends {turns[i][1][:60]!r} by no special token{within}: a model would never stop"
            )
        spans.append(answer.generated or (answer.start, stop))
    return spans


def _end_position(tokens: _Tokens, text: str, stop: int, control: set[int]) -> int | None:
    """Position of the control token that follows the content which ends at `stop`, with nothing but space between."""
    for i in range(bisect_left(tokens.starts, stop), len(tokens.ids)):
        if tokens.ids[i] in control:
            return i
        if text[tokens.starts[i] : tokens.stops[i]].strip():
            return None
    return None


def _end_id(tokens: _Tokens, text: str, stop: int, control: set[int]) -> int | None:
    end = _end_position(tokens, text, stop, control)
    return None if end is None else tokens.ids[end]


def _first_control(tokens: _Tokens, start: int | None, control: set[int]) -> int | None:
    following = tokens.ids[bisect_left(tokens.starts, start) :] if start is not None else []
    return next((token for token in following if token in control), None)


# ------------------------------------------------------------------------------------------------- control tokens


def _spells_control(turns: Turns, template: ChatTemplate) -> bool:
    return any(template.control_texts.search(content) for _, content in turns)


def _contents(turns: Turns, text: str, ends: list[tuple[int, int]], template: ChatTemplate) -> list[Span]:
    """Where contents stand. Raises ValueError if one that spells a control token is not shown as it is."""
    spans, shown = [], set()
    for i, end in ends:
        content = turns[i][1].strip()
        length = len(commonprefix([content[::-1], text[max(0, end - len(content)) : end][::-1]]))
        spans.append((end - length, end))
        hidden = len(content) - length
        if not any(match.start() < hidden for match in template.control_texts.finditer(content)):
            shown.add(i)
    for i, (role, content) in enumerate(turns):
        if i not in shown and (match := template.control_texts.search(content)):
            raise ValueError(f"a text of {role} holds {match[0]!r}, and the chat template rewrites it: leave it out")
    return spans


def _encode_as_text(tokens: _Tokens, text: str, contents: list[Span], template: ChatTemplate) -> int:
    """Put text in place of the control tokens inside `contents`; returns of how many."""
    control, count = set(template.control.values()), 0
    for start, stop in sorted(contents, reverse=True):  # from the end: positions before stay as they are
        first = max(bisect_left(tokens.starts, start) - 1, 0)  # it may begin in white space before the content
        for i in range(bisect_left(tokens.starts, stop) - 1, first - 1, -1):
            if tokens.ids[i] in control and tokens.stops[i] > start:
                a, b = tokens.starts[i], tokens.stops[i]
                ids = _piece_ids(text[a:b], template.tokenizer, as_text=True)
                if control & set(ids):
                    raise ValueError(f"the tokenizer knows {text[a:b].strip()!r} as a control token only: leave it out")
                tokens.replace(i, i + 1, ids, a, b)
                count += 1
    return count


# --------------------------------------------------------------------------------------------------------- tokens


def _tokenise(text: str, tokenizer: "Tokenizer") -> _Tokens:
    backend = tokenizer.backend_tokenizer
    processor = backend.post_processor
    backend.post_processor = None  # it adds nothing here, and may leave spaces out of where tokens begin
    try:
        found = tokenizer(text, **AS_IT_IS, return_offsets_mapping=True)
    finally:
        backend.post_processor = processor
    starts, stops = zip(*found["offset_mapping"], strict=True) if found["input_ids"] else ((), ())
    return _Tokens(found["input_ids"], list(starts), list(stops))


def _split_at(tokens: _Tokens, text: str, place: int, tokenizer: "Tokenizer") -> None:
    """Have no token on both sides of the character `place`."""
    last = bisect_left(tokens.starts, place)
    first = last
    while first and tokens.stops[first - 1] > place:  # several tokens of one character have all of its place
        first -= 1
    if first < last:
        start, stop = tokens.starts[first], tokens.stops[last - 1]
        tokens.replace(first, last, _piece_ids(text[place:stop], tokenizer), place, stop)
        # in front of those, which are now from `first` on
        tokens.replace(first, first, _piece_ids(text[start:place], tokenizer), start, place)


def _piece_ids(piece: str, tokenizer: "Tokenizer", as_text: bool = False) -> list[int]:
    """The tokens of a piece from within a text. as_text: control tokens are text as well.

    Behind a line break, which is removed again: some tokenizers put a space before all that they are given.
    """
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    options = AS_IT_IS | ({"split_special_tokens": True} if as_text else {})
    try:
        anchor = tokenizer("\n", **options)["input_ids"]
        ids = tokenizer("\n" + piece, **options)["input_ids"]
        if ids[: len(anchor)] == anchor:
            return ids[len(anchor) :]
        return tokenizer(piece, **options)["input_ids"]
    finally:
        backend.encode_special_tokens = before
