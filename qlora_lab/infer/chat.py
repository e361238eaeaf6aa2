"""A conversation: questions under the tokenizer's chat template, answers that come in pieces, and their speed.

In: a model and its tokenizer, then one question after the other. Out: pieces of text; `reply` once an answer has ended.

    chat = Chat(model, tokenizer)
    for piece in chat.ask("What is the capital of France?"):
        print(piece, end="")
    print(chat.reply.rate, "tokens per second")

A question reads what is new: keys and values of the turns before it are kept (prefix.py). Some templates render an
earlier turn differently once another follows it, such as without its thoughts; from there on all is read again.
"""

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from qlora_lab.adapters.adapter import without_adapters
from qlora_lab.data.dataset import prompt_of
from qlora_lab.data.examples import Example
from qlora_lab.infer.decode import GREEDY, Answer, Decoding, Ended, check_context, check_sampling
from qlora_lab.infer.prefix import Prefix
from qlora_lab.infer.sampling import Sampling
from qlora_lab.model.loaded import check_pair
from qlora_lab.quant.numbers import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


class Reply(NamedTuple):
    """An answer that has ended, and its speed."""

    text: str
    ended: Ended
    tokens: int
    wait: float  # seconds until the first piece: reading what is new, and compiling the kernel once
    rate: float | None  # tokens per second from then on; None for an answer of one piece

    @property
    def speed(self) -> str:
        """The rate in words, "" if it is unknown."""
        # three digits: two runs differ in the third
        return "" if self.rate is None else f"{self.rate:.{0 if self.rate >= 100 else 1}f} tokens per second"


class Chat:
    """A conversation with a model.

    adapter: False talks with the base, from the same packed weights; ValueError if the model has no adapter, or if all
    of its weights learned. max_new_tokens: of an answer. Each answer draws with the seed of `sampling`. int8 is
    refused here where `decode` would refuse it.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: "Tokenizer",
        max_new_tokens: int = 512,
        sampling: Sampling = GREEDY,
        *,
        adapter: bool = True,
    ):
        check_pair(model, tokenizer)
        check_whole("max_new_tokens", max_new_tokens)
        check_sampling(model, sampling, adapter)
        if not adapter:
            with without_adapters(model):
                pass  # now, and not at the first question, it says whether there is a base to go back to
        self._model, self._tokenizer, self._most, self._sampling = model, tokenizer, max_new_tokens, sampling
        self._adapter = adapter
        self.turns: list[tuple[str, str]] = []  # (role, text)
        self.reply: Reply | None = None  # to the last question
        self._prefix: Prefix | None = None  # what the last answer has read

    def reset(self) -> None:
        """Forget all turns."""
        self.turns, self.reply, self._prefix = [], None, None

    def ask(self, question: str) -> Iterator[str]:
        """Return the pieces of the answer, which never cut a character.

        An iteration that is closed or interrupted keeps what was said as the answer; an answer without a word is
        forgotten with its question. So is an answer that an error ends, and one whose conversation was meanwhile reset,
        or continued with another question.
        Raises ValueError for a conversation longer than the context, with both numbers, and for a question that the
        template or the tokenizer refuses; the conversation then is as before.
        """
        turns = (*self.turns, ("user", question), ("assistant", ""))  # the last is only asked for
        ids = prompt_of(Example(turns), self._tokenizer).ids
        # Decoding would refuse it, too, but speak of a prompt, which nobody here has written
        fix = "reset the conversation, or ask a shorter question"
        check_context("the conversation", len(ids), self._model, self._adapter, fix)
        run = Decoding(self._model, self._tokenizer, [ids], self._most, self._sampling, adapter=self._adapter)
        run.remember = True
        run.prefix, self._prefix = self._prefix, None  # an old cache goes as soon as the new one holds what is in it
        self.reply = None  # a caller that stops before the first piece must not find the last answer here
        return self._answer(question, run, self.turns)

    def _answer(self, question: str, run: Decoding, before: list[tuple[str, str]]) -> Iterator[str]:
        pieces = iter(run)
        spent: list[float] = []  # of each piece; what the caller does between two is not the model's time
        first = 0  # tokens in the first piece
        failed = False
        try:
            while True:
                begin = time.perf_counter()
                piece = next(pieces, None)
                spent.append(time.perf_counter() - begin)
                if piece is None:
                    break
                first = first or len(run.answers[0].ids)
                yield piece.text
        except Exception:  # neither an interrupt nor the caller who closes the iteration
            failed = True
            raise
        finally:  # also after an interrupt, and when the caller closes the iteration
            pieces.close()  # after an interrupt it would otherwise end with the last reference to it
            # else the conversation was reset, or continued with another question, while this answer came
            if self.turns is before and not failed:
                self._prefix = run.prefix
                self._keep(question, run.answers[0], first, spent)

    def _keep(self, question: str, answer: Answer, first: int, spent: list[float]) -> None:
        """Write a reply down. first: tokens in the first piece; spent: seconds for each piece, and for the end."""
        later = sum(spent[1:])
        rate = (len(answer.ids) - first) / later if later and len(answer.ids) > first else None
        self.reply = Reply(answer.text, answer.ended, len(answer.ids), sum(spent[:1]), rate)
        # a turn without a word would teach the model to say nothing, and some templates refuse it
        if answer.text.strip():
            self.turns = [*self.turns, ("user", question), ("assistant", answer.text)]
