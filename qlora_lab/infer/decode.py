"""Write what follows a text, token by token: greedy or drawn, for several texts at once, as a stream of pieces.

In: a model, its tokenizer, and texts or ids. Out: an Answer for each, or pieces of text while they come.

    prompt -> read_prompt, all tokens but the last -> step: logits -> choose -> a piece of text
                                                       ^______________ the token __|

Models of LLaMA's shape on the CPU are computed from their packed weights in float32 (stack.py, fast.py): the answer is
that of the dequantised model, up to what int8 loses where it was asked for. All others go through transformers'
`generate`, and a warning says so.
Rows of different lengths need no padding: each has its own place in the cache. A row that ends makes the rest faster.
"""

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from tqdm.auto import tqdm

from qlora_lab.adapters.adapter import without_adapters
from qlora_lab.adapters.virtual_tokens import virtual_tokens
from qlora_lab.data.examples import check_text
from qlora_lab.infer.cache import Cache, make_cache
from qlora_lab.infer.fallback import generated, stop_ids
from qlora_lab.infer.fast import step_of
from qlora_lab.infer.int8 import with_int8
from qlora_lab.infer.pieces import Pieces
from qlora_lab.infer.prefix import Prefix, take_over, weights_of
from qlora_lab.infer.sampling import Chooser, Sampling
from qlora_lab.infer.stack import Stack, UnlikeLlama, read_stack
from qlora_lab.infer.step import forward, read_prompt
from qlora_lab.model.loaded import check_pair
from qlora_lab.quant.numbers import check_whole
from qlora_lab.train.interrupt import Terminated
from qlora_lab.train.limits import check_tokens, position_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

GREEDY = Sampling()
_ASKING = threading.RLock()  # the base is asked by taking the adapter out of the model that another thread may read
Ended = Literal["end", "stop", "length", "context", "interrupted"]


class Piece(NamedTuple):
    """Text that belongs to the answer of one prompt; half a character only where the model itself ends in it."""

    row: int  # of the prompts, from 0
    text: str


@dataclass(frozen=True)
class Answer:
    """What follows one prompt."""

    text: str
    ids: list[int] = field(repr=False)  # without the end token; with the tokens of a stop
    ended: Ended  # by its end token, a stop, max_new_tokens, the end of the context, or Ctrl-C or an error


def decode(
    model: torch.nn.Module,
    tokenizer: "Tokenizer",
    prompts: "str | Sequence[str | Sequence[int]]",
    max_new_tokens: int = 128,
    sampling: Sampling = GREEDY,
    *,
    progress: bool = True,
) -> list[Answer]:
    """Continue texts, or rows of ids, and return an Answer for each. One text counts as a list of one.

    Texts are continued as they are: for a question, apply the tokenizer's chat template. sampling: greedy by default,
    without a stop. Ctrl-C ends all answers where they are, and returns them; Terminated is passed on.
    Raises ValueError for a prompt without tokens, or longer than the context, with both numbers, for a token without
    embedding, for options that are not allowed, and for int8 where no weight fits or transformers answers;
    TypeError for a `sampling` of another type; FloatingPointError for a NaN, which names the layer. Warns where
    transformers answers; a NaN's layer is then not named.
    """
    run = Decoding(model, tokenizer, prompts, max_new_tokens, sampling)
    bar = tqdm(desc="answers", unit="piece", leave=False, delay=2, disable=not progress)
    with bar:
        try:
            for _ in run:
                bar.update()
        except Terminated:  # a KeyboardInterrupt as well
            raise
        except KeyboardInterrupt:
            pass  # what was said so far is there
    return run.answers


class Decoding:
    """The answers to prompts while they come: iterate over its pieces. Arguments and errors are those of `decode`.

    An iteration that ends early, by `break` or Ctrl-C, leaves what was said in `answers`, as "interrupted". Another
    one goes on to the same answers; after Ctrl-C, the piece that was being written may be in `answers` alone. While it
    runs, the earlier one raises ValueError.
    adapter: False answers as the base does, from the same packed weights; an iteration raises ValueError if the model
    has no adapter, or if all of its weights learned.
    prefix: set it to that of an earlier Decoding, whose tokens are then not read again where a prompt begins with them.
    remember: set it to True, and an iteration leaves what it read in `prefix`; None where transformers answered. All
    weights are looked at for that, which takes the time of a few tokens.
    """

    def __init__(self, model, tokenizer, prompts, max_new_tokens=128, sampling=GREEDY, *, adapter=True):
        check_pair(model, tokenizer)
        check_whole("max_new_tokens", max_new_tokens)
        check_sampling(model, sampling, adapter)  # now, and not with the first piece
        self._adapter = adapter
        self._begun = 0  # iterations
        self.prefix: Prefix | None = None
        self.remember = False
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._prompts = _as_ids(prompts, tokenizer)
        check_tokens(model, tokenizer, {token for ids in self._prompts for token in ids})
        self._limit = context_of(model, adapter)
        for number, ids in enumerate(self._prompts):
            if not ids:
                raise ValueError(f"prompt {number} has no token: give at least one, such as the tokenizer's first")
            check_context(f"prompt {number}", len(ids), model, adapter, "shorten it")
        self._rows = [_Row(ids, tokenizer, sampling, i, max_new_tokens) for i, ids in enumerate(self._prompts)]
        for row in self._rows:
            room = max_new_tokens if self._limit is None else self._limit - len(row.prompt) + 1  # the last is not read
            if room < max_new_tokens:
                row.room, row.cut = room, "context"
        self._ends = stop_ids(model, tokenizer)

    @property
    def answers(self) -> list[Answer]:
        """One for each prompt, of what was said so far."""
        return [Answer("".join(row.text), [*row.ids], row.ended or "interrupted") for row in self._rows]

    def __iter__(self) -> Iterator[Piece]:
        try:
            with asked(self._model, self._adapter):  # a stack holds the weights themselves: the adapter can come back
                stack = read_stack(self._model)
        except UnlikeLlama as reason:
            warnings.warn(f"{reason}: transformers' generate answers, more slowly", stacklevel=2)
            return self._by_transformers()
        return self._by_steps(stack)

    def _by_steps(self, stack: Stack) -> Iterator[Piece]:
        longest = max(len(row.prompt) + row.room for row in self._rows) - 1  # the model never reads the last token
        cache = make_cache(stack, len(self._rows), longest, self._sampling.cache_bits)
        before, self.prefix = self.prefix, None
        needed = self.remember or before is not None
        weights = (weights_of(stack), self._sampling.int8) if needed else ()
        if before is not None:
            take_over(before, [row.known[:-1] for row in self._rows], weights, cache)
            del before  # its cache: two would stay
        self._begun += 1
        number = self._begun
        try:
            for piece in self._answers(stack, cache):
                yield piece
                # the other has said tokens that are not in this cache
                if number != self._begun:
                    raise ValueError("another iteration over these answers has begun: go on with that one")
        finally:
            if number == self._begun and self.remember:
                read = zip(self._rows, cache.lengths.tolist(), strict=True)
                self.prefix = Prefix([row.known[:n] for row, n in read], cache, weights)

    def _answers(self, stack: Stack, cache: Cache) -> Iterator[Piece]:
        step = step_of(stack, self._sampling.int8)
        for row in self._unended():  # an iteration goes on where the last one stopped
            row.begin(row.ids)
            if row.ended is not None:
                continue
            with torch.no_grad():
                there = int(cache.lengths[row.number])  # taken over
                prompt = torch.tensor(row.prompt[there:-1], dtype=torch.int64)
                read_prompt(stack, prompt, cache, row.number, self._sampling.int8)
                if said := row.known[max(there, len(row.prompt) - 1) : -1]:
                    # an answer that was left goes on as it would have, up to the order of sums
                    read_prompt(stack, torch.tensor(said, dtype=torch.int64), cache, row.number, self._sampling.int8)
        while rows := self._unended():
            active = [row.number for row in rows]
            last = torch.tensor([row.last for row in rows], dtype=torch.int64)
            with torch.no_grad():  # inside the loop: the caller's code between two pieces is not ours
                logits = step(last, cache, torch.tensor(active, dtype=torch.int64))
                if not logits.isfinite().all():
                    raise _where(stack, last, cache, active)
            for row, its in zip(rows, logits, strict=True):
                if text := row.take(its, self._ends):
                    yield Piece(row.number, text)

    def _unended(self) -> "list[_Row]":
        return [row for row in self._rows if row.ended is None]

    def _by_transformers(self) -> Iterator[Piece]:
        self.prefix = None
        for row in self._unended():
            new: list[int] = []
            own = replace(self._sampling, seed=(self._sampling.seed + row.number) % 2**63)
            try:
                with asked(self._model, self._adapter):
                    generated(self._model, self._tokenizer, row.prompt, row.room, own, new)
            except KeyboardInterrupt:
                row.begin(new)
                raise
            row.begin([])  # an interrupt may have left a part of this answer
            text = "".join(row.add(token) for token in new)
            if row.ended is None:
                text += row.end("end")
            if text:
                yield Piece(row.number, text)


class _Row:
    """One prompt and its answer so far. If they differ, `ids` count: Ctrl-C may come between a token and its text."""

    def __init__(self, prompt: list[int], tokenizer: "Tokenizer", sampling: Sampling, number: int, most: int):
        self.prompt, self.number, self.room = prompt, number, most
        self.cut: Ended = "length"  # what ends it when there is no more room
        self.ids: list[int] = []
        self.text: list[str] = []
        self.ended: Ended | None = None
        self._new_pieces = partial(Pieces, tokenizer, sampling.stops, prompt[-1])
        self._pieces = self._new_pieces()
        self._chooser = Chooser(sampling, prompt, number)

    @property
    def known(self) -> list[int]:
        return [*self.prompt, *self.ids]

    @property
    def last(self) -> int:
        """The token that the next step reads; `known` would copy all of them for each token."""
        return (self.ids or self.prompt)[-1]

    def begin(self, said: list[int]) -> None:
        """Set the answer so far to these ids, and to their text."""
        pieces = self._new_pieces()
        text = [pieces.add(token) for token in said]
        self._pieces, self.text, self.ids = pieces, text, [*said]
        self._end_if_due()

    def take(self, logits: torch.Tensor, ends: list[int]) -> str:
        """Choose the next token, and return the text that it makes certain."""
        token = self._chooser.choose(logits, self.ids)
        return self.end("end") if token in ends else self.add(token)

    def add(self, token: int) -> str:
        if self.ended is not None:
            return ""
        self.ids.append(token)
        text = self._pieces.add(token)
        self.text.append(text)
        return text + self._end_if_due()

    def _end_if_due(self) -> str:
        if self._pieces.stopped:
            self.ended = "stop"
        return self.end(self.cut) if self.ended is None and len(self.ids) == self.room else ""

    def end(self, why: Ended) -> str:
        text = self._pieces.rest(cut=why != "end")
        self.text.append(text)
        self.ended = "stop" if self._pieces.stopped else why
        return text


@contextmanager
def asked(model: torch.nn.Module, adapter: bool) -> Iterator[None]:
    """Inside the `with` block the model is as it is, or without its adapter, for this thread alone."""
    with _ASKING, nullcontext() if adapter else without_adapters(model):
        yield


def check_sampling(model: torch.nn.Module, sampling: Sampling, adapter: bool) -> None:
    """Raise TypeError for anything but a Sampling, ValueError for int8 or an 8-bit cache that the model cannot have."""
    if not isinstance(sampling, Sampling):
        raise TypeError(f"sampling={sampling!r:.60} is not allowed: give a qlora_lab.Sampling")
    if not sampling.int8 and sampling.cache_bits == 32:
        return
    what = "this model does not compute in int8" if sampling.int8 else "this model has no cache of 8 bits"
    try:
        with asked(model, adapter):
            stack = read_stack(model)
    except UnlikeLlama as reason:
        raise ValueError(f"{what} ({reason}): leave the option out") from None
    if sampling.int8:
        with_int8(stack)


def _as_ids(prompts, tokenizer: "Tokenizer") -> list[list[int]]:
    if isinstance(prompts, str):
        prompts = [prompts]
    elif not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts={prompts!r:.60} is not allowed: give a text, or a list with a text or ids for each")
    return [_ids_of(f"prompt {number}", prompt, tokenizer) for number, prompt in enumerate(prompts)]


def _ids_of(name: str, prompt, tokenizer: "Tokenizer") -> list[int]:
    if isinstance(prompt, str):
        check_text(prompt, name)
        return tokenizer(prompt)["input_ids"]
    # bytes are a sequence of whole numbers, too
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes) or any(type(token) is not int for token in prompt):
        advice = "it must be a text, or a list of whole numbers (of a tensor: .tolist())"
        raise ValueError(f"{name} is {prompt!r:.60}, but {advice}")
    return list(prompt)


def context_of(model: torch.nn.Module, adapter: bool = True) -> int | None:
    """Return how many tokens a text may have, less an adapter's virtual ones. None if the model does not say."""
    limit = position_limit(model)
    return limit if limit is None or not adapter else limit - virtual_tokens(model)


def check_context(what: str, length: int, model: torch.nn.Module, adapter: bool, fix: str) -> None:
    """Raise ValueError if `length` tokens of `what` are more than the context holds, with both numbers."""
    limit = context_of(model, adapter)
    if limit is None or length <= limit:
        return
    whole = position_limit(model)
    first = f", and {whole - limit} virtual tokens come first" if whole > limit else ""
    raise ValueError(f"{what} has {length} tokens, but the context of this model is {whole}{first}: {fix}")


def _where(stack: Stack, last: torch.Tensor, cache: Cache, rows: list[int]) -> FloatingPointError:
    """Compute the step once more by the readable twin, which names the layer."""
    try:
        for token, row in zip(last, rows, strict=True):
            cache.lengths[row] -= 1
            forward(stack, token[None], cache, row)
    except FloatingPointError as error:
        return error
    return FloatingPointError("the head, or the norm in front of it, computes a logit that is not finite")
