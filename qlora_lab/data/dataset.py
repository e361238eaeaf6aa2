"""A data set: examples become tokens and labels, some of them a padded batch.

    load_data -> [Example] -> encode -> Encoded -> collate -> batch        Batches (batches.py) says which come next

Padding is masked by position, not by id, so a pad token that equals the end token hides nothing.
An example that is too long is left out whole and counted: a cut answer would lose its end token, and a cut prompt would
ask about half a function.
"""

import warnings
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from qlora_lab.data.chat_template import ChatTemplate
from qlora_lab.data.docstrings import docstring_split
from qlora_lab.data.examples import Example, read_examples
from qlora_lab.data.labels import (
    IGNORED,
    Encoded,
    Notes,
    encode as encode,  # callers take these three from here
    encode_within,
    end_token_id as end_token_id,
    prompt_ids as prompt_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


@dataclass(frozen=True)
class EncodeReport:
    """What became of a data set."""

    kept: int  # examples
    too_long: int  # examples that were left out
    longest: int  # tokens of the longest example, left out or not
    tokens: int  # of the examples that were kept
    learned_tokens: int  # of these, how many are labels
    notes: Notes = Notes()


def load_data(source: str | Path, split: str = "train", *, progress: bool = True) -> list[Example]:
    """Return the examples of "docstrings" (splits "train" and "test") or of a file (one split, "train").

    Raises ValueError for an unknown split; for a file also what read_examples raises.
    """
    if source == "docstrings":
        return docstring_split(split, progress)
    if split != "train":
        raise ValueError(f'unknown split {split!r} of {source}: a file has only "train"; test on a second file')
    return read_examples(source)


def encode_all(
    examples: list[Example],
    tokenizer: "Tokenizer",
    max_length: int,
    enough: int | None = None,
    progress: bool = True,
    clock: datetime | None = None,
) -> tuple[list[Encoded], EncodeReport]:
    """Encode the first `enough` examples of at most `max_length` tokens, in their order, and count the longer ones.

    An example takes about 1 ms, so ask for as many as the training will see; None: all. clock: the time that a template
    writes; None: now. Raises ValueError if no example is short enough, and for the first that cannot be encoded. Warns
    of empty answers and of answers that the template hides.
    """
    template = ChatTemplate(tokenizer, clock or datetime.now())  # one date for all, also around midnight
    kept: list[Encoded] = []
    lengths = []  # of all, kept or not
    bar = tqdm(examples, "tokens", unit="example", leave=False, disable=not progress)
    for example in bar:
        encoded = encode_within(example, template, max_length)
        if isinstance(encoded, int):
            lengths.append(encoded)
        else:
            lengths.append(len(encoded.input_ids))
            kept.append(encoded)
        if len(kept) == enough:
            bar.total = None  # a notebook shows a bar that ends before its total in red, for ever
            break
    if not lengths:
        raise ValueError("there are no examples: give at least one")
    longest = max(lengths)  # tells a user what max_length would take
    if not kept:
        shortest = min(lengths)
        raise ValueError(f"no example has at most {max_length} tokens: allow at least {shortest}, as in the shortest")
    learned = sum(label != IGNORED for encoded in kept for label in encoded.labels)  # tokens
    tokens = sum(len(encoded.input_ids) for encoded in kept)
    notes = sum((encoded.notes for encoded in kept), Notes())
    for warning in notes.warnings():
        warnings.warn(warning, stacklevel=2)
    return kept, EncodeReport(len(kept), len(lengths) - len(kept), longest, tokens, learned, notes)


def show_labels(encoded: Encoded, tokenizer: "Tokenizer") -> list[tuple[str, bool]]:
    """Return (text, whether it is learned) of each token: what a notebook colours."""
    texts = [tokenizer.decode([token]) for token in encoded.input_ids]
    return list(zip(texts, (label != IGNORED for label in encoded.labels), strict=True))


def collate(batch: list[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right: input_ids, attention_mask and labels, each (batch, longest of this batch) int64."""
    rows = [torch.tensor(encoded.input_ids) for encoded in batch]  # (length,) each
    labels = [torch.tensor(encoded.labels) for encoded in batch]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_id),
        # From the lengths, not from `input_ids != pad_id`: where pad and end are one token, that would mask real ends.
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }


def to_device(batch: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device  # a quantised model has parameters too: embeddings, norms
    return {name: tensor.to(device) for name, tensor in batch.items()}


def pad_token_id(tokenizer: "Tokenizer") -> int:
    """Return the id that fills rows: the pad token, or else the end token. It is masked, so it changes no result."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
