"""Tokens become text while they come: pieces that never cut a character, and stops.

In: ids, one at a time. Out: the text that is certain by now. All pieces of a row together are its answer.

A token may hold half a character, so the text of the tokens so far can end with U+FFFD, which stands for bytes that are
not a character yet; that text waits. So does text that could be the beginning of a stop.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

HALF = "\ufffd"  # what a tokenizer writes for bytes that are not a character


class Pieces:
    """The text of one row. stops: texts that end it, and are not part of it. before: the token that it follows."""

    def __init__(self, tokenizer: "Tokenizer", stops: Sequence[str] = (), before: int | None = None):
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = [] if before is None else [before]
        self._first = 0  # of the tokens that are decoded again, because a token's text depends on the one before it
        if self._text(len(self._ids)).endswith(HALF):  # the rest of that character would be missed
            self._ids = []
        self._done = len(self._ids)  # tokens whose text was taken
        self._waiting = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that this token makes certain, "" if there is none."""
        self._ids.append(token)
        text = self._text(len(self._ids))
        if text.endswith(HALF):
            return ""
        return self._certain(self._take(text))

    def rest(self, cut: bool) -> str:
        """Return what still waits, at the end of an answer. cut: it would have gone on; half a character is dropped."""
        text, self._waiting = self._waiting + self._take(self._text(len(self._ids))), ""
        text = text.rstrip(HALF) if cut else text  # some tokenizers write one for each byte of a run that is not whole
        end = self._stop_in(text)
        self.stopped |= end is not None
        return text[:end]

    def _take(self, text: str) -> str:
        new = text[len(self._text(self._done)) :]
        if new:  # a token without text, such as a special one, tells the next nothing: keep the one before it
            self._first = self._done
        self._done = len(self._ids)
        return new

    def _text(self, stop: int) -> str:
        ids = self._ids[self._first : stop]
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _certain(self, new: str) -> str:
        text = self._waiting + new
        cut = self._stop_in(text)
        if cut is not None:
            self.stopped, self._waiting = True, ""
            self._first = self._done = len(self._ids)
            return text[:cut]
        longest = max(map(len, self._stops), default=1)
        held = next(  # the longest end of the text that begins a stop
            (n for n in range(min(longest - 1, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops)),
            0,
        )
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]

    def _stop_in(self, text: str) -> int | None:
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        return min(places, default=None)
