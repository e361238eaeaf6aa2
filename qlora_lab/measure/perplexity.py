"""Perplexity: among how many tokens, on average, is the model undecided?

In: a model of transformers, its tokenizer and a text. Out: exp of the mean cross entropy, a number of at least 1.

The first `windows` x `length` tokens are cut into windows that do not overlap, and each token is predicted from its own
window only; the first token of a window is predicted from nothing and does not count. No BOS token is added. Longer
windows give more context and a lower number: perplexities compare only at equal text, tokenizer, length and windows.

Not here: the loss on answers (train/loss.py).
"""

import math
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from qlora_lab.quant.numbers import check_whole
from qlora_lab.train.limits import check_length, check_tokens
from qlora_lab.train.loss import batch_losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

WORD = 64  # tokens; a text cut within a word has others at its end


def topics_text() -> str:
    """The help topics of this Python, by sorted key, joined by blank lines: English prose that needs no download.

    465,126 characters on Python 3.11; other versions of Python have other texts, so their perplexities differ.
    """
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def perplexity(
    model: torch.nn.Module,
    tokenizer: "Tokenizer",
    text: str,
    length: int = 512,
    windows: int = 8,
    *,
    progress: bool = True,
) -> float:
    """Perplexity of the first `windows` windows of `length` tokens of `text`.

    Raises ValueError if `text` has fewer tokens than that, if a window has no token to predict, or if the model has no
    embedding for a token or no position for a window's last one; warns of windows longer than it was made for.
    """
    rows = text_windows(tokenizer, text, length, windows)
    check_windows_fit(model, tokenizer, rows)
    return math.exp(fmean(window_losses(model, rows, progress)))


def check_windows_fit(model: torch.nn.Module, tokenizer: "Tokenizer", rows: torch.Tensor) -> None:
    """Raise ValueError if the model cannot read windows of tokens, (windows, length) int64; warn if they are long."""
    check_tokens(model, tokenizer, set(rows.flatten().tolist()))
    check_length(model, rows.shape[1], "a window", "take a smaller length (--length)")


def text_windows(tokenizer: "Tokenizer", text: str, length: int = 512, windows: int = 8) -> torch.Tensor:
    """The first `windows` x `length` tokens of `text`: (windows, length) int64. Raises as perplexity does."""
    check_windows(length, windows)
    ids = _first_ids(tokenizer, text, length * windows)
    if len(ids) < length * windows:
        fewer = f"windows={len(ids) // length}" if len(ids) >= length else "shorter windows"
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than {windows} windows of {length}: take {fewer} or a longer text"
        )
    return torch.tensor(ids[: length * windows]).view(windows, length)


def _first_ids(tokenizer: "Tokenizer", text: str, needed: int) -> list[int]:
    """The first `needed` tokens of `text` and some more; all where it has fewer.

    A text of any size may be given, and 10 million characters take 7 s and 1.4 GB: so only a beginning is looked at.
    """
    taken = 16 * needed  # characters; 4 or 5 make a token of English
    while True:
        ids = tokenizer(text[:taken], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= needed + WORD or taken >= len(text):
            return ids
        taken *= 4


def check_windows(length: int, windows: int) -> None:
    """Raise ValueError unless each of `windows` windows of `length` tokens has a token to predict, and there is one."""
    check_whole("length", length, 2)
    check_whole("windows", windows)


def window_losses(model: torch.nn.Module, rows: torch.Tensor, progress: bool = True) -> list[float]:
    """Mean cross entropy of each window, (windows, length) int64, in nats a predicted token.

    exp of their mean is the perplexity: each window predicts as many tokens. Their spread is what it can be trusted by.
    """
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows[:, None]]
    return [loss / labels for loss, labels in batch_losses(model, batches, "perplexity", progress)]
