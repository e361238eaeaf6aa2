"""A data set: examples become tokens and labels, some of them a padded batch.

    load_data -> [Example] -> encode -> Encoded -> collate -> batch        Batches (batches.py) says which come next

Padding is masked by position, not by id, so a pad token that equals the end token hides nothing.
An example that is too long is left out whole and counted: a cut answer would lose its end token, and a cut prompt would
ask about half a function.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from qlora_lab.data.chat_template import ChatTemplate
from qlora_lab.data.docstrings import docstring_split
from qlora_lab.data.examples import Example, Examples, check_any_left, read_examples
from qlora_lab.data.labels import (
    IGNORED,
    Encoded,
    Notes,
    Prompt as Prompt,
    encode as encode,  # callers take these from here
    encode_within,
    end_token_id as end_token_id,
    prompt_ids as prompt_ids,
    prompt_of as prompt_of,
)
from qlora_lab.data.pictures import picture_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer


REASONS = 5  # of skipped records, in a warning


@dataclass(frozen=True)
class EncodeReport:
    """What became of a data set."""

    kept: int  # examples
    too_long: int  # examples that were left out
    longest: int  # tokens of the longest example, left out or not
    tokens: int  # of the examples that were kept
    learned_tokens: int  # of these, how many are labels
    notes: Notes = Notes()
    skipped: tuple[str, ...] = ()  # place and reason of each record that could not be used


def load_data(
    source: str | Path | Iterable | Mapping[str, Iterable],
    split: str = "train",
    *,
    skip_bad: bool = False,
    progress: bool = True,
) -> Examples:
    """Return the examples of "docstrings" (splits "train" and "test"), a file, a list of dicts, or a data set.

    A data set is one of Hugging Face's `datasets`. Only those with splits, by name, have another split than "train".
    skip_bad: leave out records that cannot be used, with a warning; `skipped` of the result holds place and reason of
    each.
    Raises ValueError for an unknown split; otherwise what read_examples raises.
    """
    if isinstance(source, str) and source == "docstrings":
        return Examples(docstring_split(split, progress))
    if isinstance(source, Mapping):  # such as a DatasetDict
        if split not in source:
            raise ValueError(
                f"unknown split {split!r}: there are {', '.join(map(str, source))}; or give a list of dicts"
            )
        return _reported(read_examples(source[split], skip_bad))
    if split != "train":
        name = source if isinstance(source, (str, Path)) else "a list or a data set"
        raise ValueError(f'unknown split {split!r} of {name}: it has only "train"; test on a second one')
    if isinstance(source, Examples):  # read before, and reported
        return source
    return _reported(read_examples(source, skip_bad))


def _reported(examples: Examples) -> Examples:
    warn_of_skipped(examples.skipped)
    return examples


def warn_of_skipped(skipped: Sequence[str]) -> None:
    """Warn of records that were left out, with the first reasons."""
    if skipped:
        count = "1 record was" if len(skipped) == 1 else f"{len(skipped):,} records were"
        more = f"; and {len(skipped) - REASONS:,} more" if len(skipped) > REASONS else ""
        warnings.warn(f"{count} skipped: {'; '.join(skipped[:REASONS])}{more}", stacklevel=3)


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
    writes; None: now. Raises ValueError if no example is short enough, and for the first that cannot be encoded; of
    Examples with skip_bad, those are left out. Warns of them, of empty answers and of answers that the template hides.
    """
    template = ChatTemplate(tokenizer, clock or datetime.now())  # one date for all, also around midnight
    kept: list[Encoded] = []
    lengths = []  # of all, kept or not
    bar = tqdm(examples, "tokens", unit="example", leave=False, disable=not progress)
    skipped: list[str] = []
    for example in bar:
        try:
            encoded = encode_within(example, template, max_length)
        except ValueError as error:
            if not (isinstance(examples, Examples) and examples.skip_bad):
                raise
            skipped.append(str(error))
            continue
        if isinstance(encoded, int):
            lengths.append(encoded)
        else:
            lengths.append(len(encoded.input_ids))
            kept.append(encoded)
        if len(kept) == enough:
            bar.total = None  # a notebook shows a bar that ends before its total in red, for ever
            break
    if not lengths:
        check_any_left(skipped)
        raise ValueError("there are no examples: give at least one")
    longest = max(lengths)  # tells a user what max_length would take
    if not kept:
        shortest = min(lengths)
        raise ValueError(f"no example has at most {max_length} tokens: allow at least {shortest}, as in the shortest")
    learned = sum(label != IGNORED for encoded in kept for label in encoded.labels)  # tokens
    tokens = sum(len(encoded.input_ids) for encoded in kept)
    notes = sum((encoded.notes for encoded in kept), Notes())
    warn_of_skipped(skipped)
    for warning in notes.warnings():
        warnings.warn(warning, stacklevel=2)
    return kept, EncodeReport(len(kept), len(lengths) - len(kept), longest, tokens, learned, notes, tuple(skipped))


def encode_held_out(
    examples: list[Example],
    tokenizer: "Tokenizer",
    max_length: int,
    figure: str,
    progress: bool = True,
    clock: datetime | None = None,
) -> list[Encoded]:
    """Encode examples for `figure`, as encode_all does. Warns of those that are longer, and so do not count in it."""
    encoded, report = encode_all(examples, tokenizer, max_length, progress=progress, clock=clock)
    if report.too_long:  # a loss over fewer examples than were given is another figure
        left_out = f"{report.too_long:,} of {len(examples):,} examples have more than {max_length} tokens"
        fix = f"max_length={report.longest} counts all (--max-length, which lengthens rows of training too)"
        warnings.warn(f"{left_out} and do not count in {figure}: {fix}", stacklevel=3)
    return encoded


def usable(examples: Iterable[Example], tokenizer: "Tokenizer") -> Examples:
    """Return the examples that can be encoded. Warns of the others; raises ValueError if none is left."""
    template = ChatTemplate(tokenizer)
    kept = Examples()
    for example in examples:
        try:
            encode_within(example, template, None)
            kept.append(example)
        except ValueError as error:
            kept.skipped.append(str(error))
    if not kept:
        check_any_left(kept.skipped)
    return _reported(kept)


def show_labels(encoded: Encoded, tokenizer: "Tokenizer") -> list[tuple[str, bool]]:
    """Return (text, whether it is learned) of each token: what a notebook colours."""
    texts = [tokenizer.decode([token]) for token in encoded.input_ids]
    return list(zip(texts, (label != IGNORED for label in encoded.labels), strict=True))


def collate(batch: list[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """Pad examples on the right: input_ids, attention_mask and labels, each (batch, longest of this batch) int64.

    With pictures also what picture_inputs returns, and its errors.
    """
    rows = [torch.tensor(encoded.input_ids, dtype=torch.int64) for encoded in batch]  # (length,) each
    labels = [torch.tensor(encoded.labels, dtype=torch.int64) for encoded in batch]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    return {
        "input_ids": input_ids,
        # From the lengths, not from `input_ids != pad_id`: where pad and end are one token, that would mask real ends.
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        **picture_inputs((encoded.pictures for encoded in batch), input_ids),
    }


def to_device(batch: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device  # a quantised model has parameters too: embeddings, norms
    return {name: tensor.to(device) for name, tensor in batch.items()}


def pad_token_id(tokenizer: "Tokenizer") -> int:
    """Return the id that fills rows: the pad token, or else the end token. It is masked, so it changes no result."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
