"""Measure perplexity: between how many tokens does the model hesitate, on average?

It is exp of the mean cross entropy. The first `windows` x `length` tokens are cut into windows that do not overlap.
Each token is predicted from its own window only; the first token of a window has nothing before it and does not count.
No BOS token is added. Longer windows give more context and a lower number, so compare perplexities only at equal text,
tokenizer, length and windows.
"""

import math
import sys
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from qlora_lab.model.loaded import check_pair
from qlora_lab.quant.numbers import check_whole
from qlora_lab.train.limits import check_length, check_tokens
from qlora_lab.train.loss import batch_losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

LARGEST_LOSS = math.log(sys.float_info.max)  # its perplexity is the largest float
WORD = 64  # tokens: a text that is cut within a word has other tokens at its end


def topics_text() -> str:
    """Join the help topics of this Python, sorted by key: English prose that needs no download.

    They have 465,126 characters in Python 3.11. Other versions have other texts, so their perplexities differ.
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
    """Return the perplexity of the first `windows` windows of `length` tokens of `text`; infinity above 1.8e308.

    Raises ValueError if `text` is too short, if a window has no token to predict, or if the model lacks an embedding
    for a token or a position for a window's last token. Warns if a window is longer than the model was made for.
    """
    check_pair(model, tokenizer)
    rows = text_windows(tokenizer, text, length, windows)
    check_windows_fit(model, tokenizer, rows)
    loss = fmean(window_losses(model, rows, progress))  # all windows predict length - 1 tokens
    return math.inf if loss > LARGEST_LOSS else math.exp(loss)


def check_windows_fit(model: torch.nn.Module, tokenizer: "Tokenizer", rows: torch.Tensor) -> None:
    """Raise ValueError if the model cannot read these windows, (windows, length) int64; warn if they are too long."""
    check_tokens(model, tokenizer, set(rows.flatten().tolist()))
    check_length(model, rows.shape[1], "a window", "take a smaller length (--length)")


def text_windows(tokenizer: "Tokenizer", text: str, length: int = 512, windows: int = 8) -> torch.Tensor:
    """Return the first `windows` x `length` tokens of `text`: (windows, length) int64. Raises as perplexity does."""
    check_windows(length, windows)
    ids = _first_ids(tokenizer, text, length * windows)  # token ids
    if len(ids) < length * windows:
        fewer = f"windows={len(ids) // length}" if len(ids) >= length else "shorter windows"
        raise ValueError(
            f"the text has {len(ids)} tokens, fewer than {windows} windows of {length}: take {fewer} or a longer text"
        )
    return torch.tensor(ids[: length * windows], dtype=torch.int64).view(windows, length)


def _first_ids(tokenizer: "Tokenizer", text: str, needed: int) -> list[int]:
    """Return at least the first `needed` tokens of `text`, or all if it has fewer.

    Only a beginning is tokenised: 10 million characters would take 7 s and 1.4 GB.
    """
    taken = 16 * needed  # characters; 4 or 5 make a token of English
    while True:
        ids = tokenizer(text[:taken], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= needed + WORD or taken >= len(text):
            return ids
        taken *= 4  # long words, or many spaces


def check_windows(length: int, windows: int) -> None:
    """Raise ValueError unless there is a window and each window has a token to predict."""
    check_whole("length", length, 2)  # the first token of a window is not predicted
    check_whole("windows", windows)


def window_losses(model: torch.nn.Module, rows: torch.Tensor, progress: bool = True) -> list[float]:
    """Return the mean cross entropy of each window, (windows, length) int64, in nats per predicted token.

    Their spread shows how far to trust the perplexity.
    """
    batches = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows[:, None]]
    return [loss / labels for loss, labels in batch_losses(model, batches, "perplexity", progress)]
