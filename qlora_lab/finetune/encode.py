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

    def around(self, start: int, stop: int) -> slice:
        """Positions of the tokens that hold a character from `start` to `stop` - 1."""
        first, last = bisect_left(self.starts, start), bisect_left(self.starts, stop)
        while first and self.stops[first - 1] > start:
            first -= 1
        return slice(first, last)

    def moved(self, by: int) -> "_Tokens":
        return _Tokens(self.ids, [start + by for start in self.starts], [stop + by for stop in self.stops])

    def __add__(self, other: "_Tokens") -> "_Tokens":
        return _Tokens(self.ids + other.ids, self.starts + other.starts, self.stops + other.stops)

    def replace(self, positions: slice, new: "_Tokens") -> None:
        self.ids[positions], self.starts[positions], self.stops[positions] = new.ids, new.starts, new.stops


def _are(count: int, noun: str) -> str:
    return f"{count:,} {noun} is" if count == 1 else f"{count:,} {noun}s are"


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
        for place in {answer.start, (answer.generated or (answer.start,))[0]}:
            _end_prompt_at(tokens, text, place, template)
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
    """Of each answer and its end token.

    What ends an answer is what ends the last one, or is followed by the same token as what ends a question: a header's
    token, where a template ends no turn, is not.
    """
    control, last = set(template.control.values()), len(turns) - 1
    (last_end, _), closing = (
        _ending(tokens, text, place, control) for place in (learned[last].stop, ends.get(last - 1))
    )
    spans = []
    for i, answer in learned.items():
        ending = _ending(tokens, text, answer.stop, control)
        ends_it = ending[0] is not None and (ending[0] == last_end or (None not in ending and ending == closing))
        stop = tokens.stops[_next_control(tokens, text, answer.stop, control)] if ends_it else len(text) + 1
        if not ends_it or (answer.generated and answer.generated[1] < stop):
            within = " in its {% generation %} block" if answer.generated else ""
            raise ValueError(
                f"the chat template ends {turns[i][1][:60]!r} by no special token{within}: a model would never stop"
            )
        spans.append(answer.generated or (answer.start, stop))
    return spans


def _ending(tokens: _Tokens, text: str, place: int | None, control: set[int]) -> tuple[int | None, int | None]:
    """The control token behind the content that ends at `place`, and the one behind that; None: text comes first."""
    first = None if place is None else _next_control(tokens, text, place, control)
    if first is None:
        return None, None
    second = _next_control(tokens, text, tokens.stops[first], control)
    return tokens.ids[first], None if second is None else tokens.ids[second]


def _next_control(tokens: _Tokens, text: str, place: int, control: set[int]) -> int | None:
    """Position of the control token behind the character `place`, with nothing but space between."""
    for i in range(bisect_left(tokens.starts, place), len(tokens.ids)):
        if tokens.ids[i] in control:
            return i
        if text[tokens.starts[i] : tokens.stops[i]].strip():
            return None
    return None


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
    """Encode anew the `contents` that hold control tokens, as text; returns how many those were."""
    control, count = set(template.control.values()), 0
    for start, stop in contents:
        positions = tokens.around(start, stop)
        found = [token for token in tokens.ids[positions] if token in control]
        if found:
            begin, end = tokens.starts[positions.start], tokens.stops[positions.stop - 1]
            new = _piece(text, begin, end, template.tokenizer, as_text=True)
            if control & set(new.ids):
                spelt = template.control_texts.search(text[start:stop])[0]
                raise ValueError(f"the tokenizer knows {spelt!r} as a control token only: leave it out of the texts")
            tokens.replace(positions, new)
            count += len(found)
    return count


# --------------------------------------------------------------------------------------------------------- tokens


def _tokenise(text: str, tokenizer: "Tokenizer", as_text: bool = False) -> _Tokens:
    """as_text: control tokens are text as well."""
    backend = tokenizer.backend_tokenizer
    processor, as_text_before = backend.post_processor, backend.encode_special_tokens
    backend.post_processor = None  # it adds nothing here, and may leave spaces out of where tokens begin
    options = {"split_special_tokens": True} if as_text else {}
    try:
        # not verbose: texts that are too long are left out later
        found = tokenizer(
            text,
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            verbose=False,
            **options,
        )
    finally:
        backend.post_processor, backend.encode_special_tokens = processor, as_text_before
    starts, stops = zip(*found["offset_mapping"], strict=True) if found["input_ids"] else ((), ())
    return _Tokens(found["input_ids"], list(starts), list(stops))


def _end_prompt_at(tokens: _Tokens, text: str, place: int, template: ChatTemplate) -> None:
    """Have the tokens before the character `place` be those of a prompt that ends there.

    A control token ends what is before it, so that only the tokens from the last one on may be others. (If a text
    spells one there, only a token on both sides of `place` is looked at: those of the prompt would be others anyway.)
    """
    control, across = set(template.control.values()), tokens.around(place, place)
    first = across.start - 1
    while first > 0 and tokens.ids[first] not in control:
        first -= 1
    if first < 0:
        return
    if template.control_texts.search(text, tokens.stops[first], place):
        if across.start == across.stop:
            return
        first = across.start
    start, stop = tokens.starts[first], max(place, tokens.stops[across.stop - 1])
    prompt = _tokenise(text[start:place], template.tokenizer).moved(start)
    if across.start < across.stop or prompt.ids != tokens.ids[first : across.stop]:
        tokens.replace(slice(first, across.stop), prompt + _piece(text, place, stop, template.tokenizer))


def _piece(text: str, start: int, stop: int, tokenizer: "Tokenizer", as_text: bool = False) -> _Tokens:
    """The tokens of a piece from within `text`. as_text: control tokens are text as well.

    Behind a line break, which is removed again: some tokenizers put a space before all that they are given.
    """
    anchor, piece = "\n", text[start:stop]
    before, tokens = _tokenise(anchor, tokenizer, as_text).ids, _tokenise(anchor + piece, tokenizer, as_text)
    skipped = len(before)
    if tokens.ids[:skipped] != before:  # the line break is one token with what follows
        anchor, skipped, tokens = "", 0, _tokenise(piece, tokenizer, as_text)
    kept = _Tokens(tokens.ids[skipped:], tokens.starts[skipped:], tokens.stops[skipped:])
    return kept.moved(start - len(anchor))
