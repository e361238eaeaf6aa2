"""A text in tokens, and where each of them stands in it.

In: a text that a chat template wrote. Out: Tokens. Two things are corrected in them:
- A message may spell a control token ("what does <|im_end|> do?"). It is encoded as text: as a token it ends a turn.
- A token may hold the end of a prompt and the beginning of an answer (a line break and an indentation). It is split
  there, as generation splits it, which is given the prompt alone.
Source: tokenizers' offsets. The control tokens are those that the tokenizer calls special, where they stand for their
own names: it calls the unknown token special too, which stands for any text.

Not here: where messages and answers stand (chat_template.py); labels (encode.py).
"""

from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora_lab.data.chat_template import ChatTemplate, Place, Span
from qlora_lab.data.examples import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass
class Tokens:
    """Equally long lists: ids, and the first and one-past-last character of each in `text`."""

    text: str
    ids: list[int]
    starts: list[int]
    stops: list[int]

    def around(self, start: int, stop: int) -> slice:
        """Positions of the tokens that hold a character from `start` to `stop` - 1, or stand on both sides of it."""
        first, last = bisect_left(self.starts, start), bisect_left(self.starts, stop)
        while first and self.stops[first - 1] > start:
            first -= 1
        return slice(first, last)

    def within(self, start: int, stop: int) -> slice:
        """Positions of the tokens that begin from `start` to `stop` - 1."""
        return slice(bisect_left(self.starts, start), bisect_left(self.starts, stop))

    def is_control(self, position: int, control: dict[int, str]) -> bool:
        """Whether the token is one of `control`, id -> name, and stands for its name."""
        name = control.get(self.ids[position])
        return name is not None and name in self.text[self.starts[position] : self.stops[position]]

    def control_after(self, place: int, control: dict[int, str]) -> int | None:
        """Position of the control token after the character `place`, if only white space is between them."""
        for i in range(bisect_left(self.starts, place), len(self.ids)):
            if self.is_control(i, control):
                return i
            if self.text[self.starts[i] : self.stops[i]].strip():
                return None
        return None

    def replace(self, positions: slice, *pieces: "Tokens") -> None:
        """Put `pieces`, which stand one after the other, in place of some tokens."""
        for name in ("ids", "starts", "stops"):
            getattr(self, name)[positions] = [value for piece in pieces for value in getattr(piece, name)]


def tokenise(text: str, tokenizer: "Tokenizer", as_text: bool = False) -> Tokens:
    """The whole text, without tokens that a tokenizer adds around it. as_text: control tokens are text as well."""
    backend = tokenizer.backend_tokenizer
    processor, as_text_before = backend.post_processor, backend.encode_special_tokens
    backend.post_processor = None  # it adds nothing here, and may leave spaces out of where tokens begin
    options = {"split_special_tokens": True} if as_text else {}
    options |= {"add_special_tokens": False, "return_attention_mask": False, "return_offsets_mapping": True}
    try:
        found = tokenizer(text, verbose=False, **options)  # verbose: what is too long is left out later
    finally:
        backend.post_processor, backend.encode_special_tokens = processor, as_text_before
    starts = [start for start, _ in found["offset_mapping"]]
    return Tokens(text, found["input_ids"], starts, [stop for _, stop in found["offset_mapping"]])


def encode_messages_as_text(tokens: Tokens, turns: Turns, places: list[Place], template: ChatTemplate) -> int:
    """Encode again, as text, what spells control tokens in messages. Returns how many such tokens there were.

    places: of ChatTemplate.places. Raises ValueError if the tokenizer has no other tokens for it.
    """
    count = 0
    for start, stop in _spelling_spans(tokens.text, turns, places, template):
        positions = tokens.around(start, stop)
        spelt = [i for i in range(positions.start, positions.stop) if tokens.is_control(i, template.control_names)]
        if spelt:
            place, end = tokens.starts[positions.start], tokens.stops[positions.stop - 1]
            piece = _piece(tokens.text, place, end, template.tokenizer, as_text=True)
            if any(piece.is_control(i, template.control_names) for i in range(len(piece.ids))):
                name = template.control_names[tokens.ids[spelt[0]]]
                raise ValueError(f"the tokenizer knows {name!r} as a control token only: leave it out of the texts")
            tokens.replace(positions, piece)
            count += len(spelt)
    return count


def _spelling_spans(text: str, turns: Turns, places: list[Place], template: ChatTemplate) -> list[Span]:
    """Where the messages that spell a control token stand, from the first that is shown to their end.

    If that is the first of all, the text before it holds none, and is encoded with it.
    """
    spans, begun = [], None  # turn, first and one-past-last character of a message that was begun
    for turn, offset, place in places:
        if begun and begun[0] != turn:
            spans.append(begun[1:])
            begun = None
        content = turns[turn][1].rstrip()
        match = template.control_texts.match(content, offset)
        if match and begun:
            begun = (turn, begun[1], place + len(match[0]))
        elif match:
            before = content[:offset].lstrip()
            alone = template.control_texts.search(before) or not text.endswith(before, 0, place)
            begun = (turn, place if alone else place - len(before), place + len(match[0]))
        elif begun:
            spans.append((begun[1], place))
            begun = None
    return [*spans, begun[1:]] if begun else spans


def end_prompt_at(tokens: Tokens, place: int, template: ChatTemplate) -> None:
    """Make the tokens before the character `place` those of a prompt that ends there.

    A control token ends what is before it, so only the tokens from the last one on can differ. (If a message
    spells one there, only a token on both sides of `place` is looked at: those of the prompt were encoded anew.)
    """
    across = tokens.around(place, place)
    melts, first = across.start < across.stop, across.start - 1
    while first > 0 and not tokens.is_control(first, template.control_names):
        first -= 1
    if first < 0:
        return
    if template.control_texts.search(tokens.text, tokens.stops[first], place):
        if not melts:
            return
        first = across.start
    start, stop = tokens.starts[first], max(place, tokens.stops[across.stop - 1])
    prompt = _piece(tokens.text, start, place, template.tokenizer, behind_line_break=False)
    if melts or prompt.ids != tokens.ids[first : across.stop]:
        tokens.replace(slice(first, across.stop), prompt, _piece(tokens.text, place, stop, template.tokenizer))


def _piece(
    text: str, start: int, stop: int, tokenizer: "Tokenizer", as_text: bool = False, behind_line_break: bool = True
) -> Tokens:
    """The tokens of a piece from within `text`.

    behind_line_break: one is put in front, and its tokens are removed again: some tokenizers put a space before all
    that they are given.
    """
    anchor = "\n" if behind_line_break else ""
    before = tokenise(anchor, tokenizer, as_text).ids if anchor else []
    tokens = tokenise(anchor + text[start:stop], tokenizer, as_text)
    if tokens.ids[: len(before)] != before:  # the line break is one token with what follows
        return _piece(text, start, stop, tokenizer, as_text, behind_line_break=False)
    skipped, shift = len(before), start - len(anchor)
    starts, stops = ([place + shift for place in places[skipped:]] for places in (tokens.starts, tokens.stops))
    return Tokens(text, tokens.ids[skipped:], starts, stops)
