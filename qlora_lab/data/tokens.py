"""A text in tokens, and where each token stands in the text.

In: a text that a chat template wrote. Out: Tokens, with two corrections:
- A message may spell a control token ("what does <|im_end|> do?"). It is encoded as text: as a token it would end the
  turn.
- A token may hold the end of a prompt and the start of an answer (a line break and an indentation). It is split there,
  because in generation, which gets the prompt alone, it is split there too.
Source: tokenizers' offsets. Control tokens are those that the tokenizer calls special and that stand for their own
names. (It calls the unknown token special too, but that stands for any text.)
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
    """The tokens of `text`, as three lists of the same length."""

    text: str
    ids: list[int]
    starts: list[int]  # first character of each
    stops: list[int]  # one past its last character

    def around(self, start: int, stop: int) -> slice:
        """Return positions of tokens that hold a character from `start` to `stop` - 1, or span that place."""
        first = bisect_left(self.starts, start)
        last = bisect_left(self.starts, stop)
        while first and self.stops[first - 1] > start:  # the bytes of one character may be several tokens
            first -= 1
        return slice(first, last)

    def within(self, start: int, stop: int) -> slice:
        """Return positions of tokens that begin from `start` to `stop` - 1."""
        return slice(bisect_left(self.starts, start), bisect_left(self.starts, stop))

    def is_control(self, position: int, control: dict[int, str]) -> bool:
        """Tell whether the token is one of `control`, id -> name, and stands for its name."""
        name = control.get(self.ids[position])
        return name is not None and name in self.text[self.starts[position] : self.stops[position]]

    def control_after(self, place: int, control: dict[int, str]) -> int | None:
        """Return the position of the control token after `place`; None if more than white space lies between."""
        for i in range(bisect_left(self.starts, place), len(self.ids)):
            if self.is_control(i, control):
                return i
            if self.text[self.starts[i] : self.stops[i]].strip():
                return None
        return None

    def replace(self, positions: slice, *pieces: "Tokens") -> None:
        """Put `pieces`, one after the other, in place of some tokens."""
        for name in ("ids", "starts", "stops"):
            getattr(self, name)[positions] = [value for piece in pieces for value in getattr(piece, name)]


def tokenise(text: str, tokenizer: "Tokenizer", as_text: bool = False) -> Tokens:
    """Tokenise a text, adding no tokens around it. as_text: control tokens are text as well."""
    backend = tokenizer.backend_tokenizer
    processor = backend.post_processor
    as_text_before = backend.encode_special_tokens  # the call below sets it and leaves it set
    backend.post_processor = None  # it would add nothing here, but may shift where tokens begin past a space
    options = {"split_special_tokens": True} if as_text else {}
    options |= {"add_special_tokens": False, "return_attention_mask": False, "return_offsets_mapping": True}
    try:
        encoding = tokenizer(text, verbose=False, **options)  # verbose warns of length, which is checked later
    finally:
        backend.post_processor = processor
        backend.encode_special_tokens = as_text_before
    starts = [start for start, _ in encoding["offset_mapping"]]
    return Tokens(text, encoding["input_ids"], starts, [stop for _, stop in encoding["offset_mapping"]])


def encode_messages_as_text(tokens: Tokens, turns: Turns, places: list[Place], template: ChatTemplate) -> int:
    """Encode again, as text, what spells control tokens in messages. Returns how many tokens that were.

    places: from ChatTemplate.places. Raises ValueError if the tokenizer has no other tokens for such a text.
    """
    count = 0  # of tokens that became text
    for start, stop in _spelling_spans(tokens.text, turns, places, template):
        positions = tokens.around(start, stop)
        spelt = [i for i in range(positions.start, positions.stop) if tokens.is_control(i, template.control_names)]
        if spelt:
            start = tokens.starts[positions.start]  # whole tokens, which may begin before the span
            stop = tokens.stops[positions.stop - 1]
            piece = _piece(tokens.text, start, stop, template.tokenizer, as_text=True)
            if any(piece.is_control(i, template.control_names) for i in range(len(piece.ids))):
                name = template.control_names[tokens.ids[spelt[0]]]
                raise ValueError(f"the tokenizer knows {name!r} only as a control token: leave it out of the texts")
            tokens.replace(positions, piece)  # later places stay right: they count characters
            count += len(spelt)
    return count


def _spelling_spans(text: str, turns: Turns, places: list[Place], template: ChatTemplate) -> list[Span]:
    """Return the spans of messages that spell a control token, each from the first spelling shown to the end.

    If that is the message's first spelling, the text before it holds none and is encoded with it.
    """
    spans: list[Span] = []
    begun = None  # turn, first and one-past-last character of a message that is not closed yet
    for turn, offset, place in places:
        if offset < 0:  # in a part, which may spell none
            continue
        if begun and begun[0] != turn:
            spans.append(begun[1:])
            begun = None
        content = turns[turn][1].rstrip()  # places do not count white space at the end
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

    A control token closes what is before it, so only the tokens from the last one on can differ. (If a message spells
    one there, only a token that spans `place` is replaced: those of the prompt were encoded anew before.)
    """
    across = tokens.around(place, place)
    melts = across.start < across.stop  # one token holds the end of the prompt and the start of the answer
    first = across.start - 1
    while first > 0 and not tokens.is_control(first, template.control_names):
        first -= 1
    if first < 0:
        return
    if template.control_texts.search(tokens.text, tokens.stops[first], place):
        if not melts:
            return
        first = across.start
    start = tokens.starts[first]
    stop = max(place, tokens.stops[across.stop - 1])
    prompt = _piece(tokens.text, start, place, template.tokenizer, behind_line_break=False)
    if melts or prompt.ids != tokens.ids[first : across.stop]:
        tokens.replace(slice(first, across.stop), prompt, _piece(tokens.text, place, stop, template.tokenizer))


def _piece(
    text: str, start: int, stop: int, tokenizer: "Tokenizer", as_text: bool = False, behind_line_break: bool = True
) -> Tokens:
    """Tokenise a piece from within `text`.

    behind_line_break: put a line break in front and drop its tokens, since some tokenizers put a space before any text.
    """
    anchor = "\n" if behind_line_break else ""
    before = tokenise(anchor, tokenizer, as_text).ids if anchor else []
    tokens = tokenise(anchor + text[start:stop], tokenizer, as_text)
    if tokens.ids[: len(before)] != before:  # the line break is one token with what follows
        return _piece(text, start, stop, tokenizer, as_text, behind_line_break=False)
    shift = start - len(anchor)  # from places in the piece to places in `text`
    starts, stops = ([place + shift for place in places[len(before) :]] for places in (tokens.starts, tokens.stops))
    return Tokens(text, tokens.ids[len(before) :], starts, stops)
