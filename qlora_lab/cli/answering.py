"""What the commands that answer share: how tokens are chosen, and an answer on its way to a terminal or a file."""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import qlora_lab as ql
from qlora_lab.cli.loading import load_model
from qlora_lab.cli.options import number, whole
from qlora_lab.show.escape import spelled

LESS_MEMORY = "use fewer --max-new-tokens, or pass the copy from `qlora-lab quantize` as the model"


def add_adapter(group) -> None:
    group.add_argument("--adapter", metavar="FOLDER", help="an adapter in PEFT's format")


def add_answer(group, most: int) -> None:
    """Add the options of an answer of at most `most` tokens. Those of Sampling have its defaults: none stands here."""
    longest = "maximum number of tokens in the answer"
    group.add_argument("--max-new-tokens", type=whole, default=most, metavar="N", help=longest)

    # SUPPRESS: an option that is not given leaves no trace, so a default has one home
    def add(option: str, kind, metavar: str, text: str, **more) -> None:
        group.add_argument(option, type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS, **more)

    add("--temperature", number, "X", "draw tokens, the more freely the higher; without it, the likeliest is taken")
    add("--top-p", number, "X", "draw among the likeliest tokens that have this share together")
    add("--repetition-penalty", number, "X", "above 1: tokens that were there before become less likely")
    add("--seed", whole, "N", "start of the random draws, beside --temperature: the same seed gives the same text")
    add(
        "--stop", str, "TEXT", "a text that ends the answer and does not belong to it; may be repeated", action="append"
    )
    less = "bits of a key or value: 32, or 8, which takes a quarter of the memory and is not exact"
    add("--cache-bits", whole, "N", less)
    faster = "compute layers in int8, which is faster: logits then err by some 3 percent (docs/answers.md)"
    group.add_argument("--int8", action="store_true", help=faster)


def sampling_of(a: argparse.Namespace) -> "ql.Sampling":
    """Return the Sampling that the options ask for."""
    from qlora_lab.infer.sampling import Sampling  # loads torch

    # only what was given: Sampling knows the rest
    options = ("temperature", "top_p", "repetition_penalty", "seed", "cache_bits")
    chosen = {name: getattr(a, name) for name in options if name in a}
    return Sampling(**chosen, stop=tuple(getattr(a, "stop", ())), int8=a.int8)


def load_with_adapter(a: argparse.Namespace):
    """Load the model with the adapter of --adapter, and its tokenizer."""
    from qlora_lab.infer.stack import narrow_head
    from qlora_lab.train.run_folder import find_adapter

    if a.adapter:  # a missing adapter should not cost the minute that a model takes
        find_adapter(Path(a.adapter))
    model, tokenizer = load_model(a)  # the base; an adapter is added in place
    if a.adapter is not None:  # "" is a mistake, such as a shell variable that is not set
        ql.load_adapter(model, a.adapter)
    if a.dtype == "auto":
        narrow_head(model)
    return model, tokenizer


def tidy(pieces: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of an answer without white space around the whole; control characters are spelled out.

    >>> list(tidy([" ", "two ", " words\\a", "\\n"]))
    ['two', '  words\\\\x07']
    """
    begun, space = False, ""  # white space waits until a word follows it
    for piece in pieces:
        text = space + piece if begun else piece.lstrip()
        kept = text.rstrip()
        space = text[len(kept) :]
        if kept:
            begun = True
            yield spelled(kept)


def unheard() -> bool:
    """Whether stdout no longer takes anything: its reader is gone, or the disk is full (streams.py keeps the error)."""
    return getattr(sys.stdout, "error", None) is not None


def print_pieces(pieces: Iterable[str]) -> None:
    """Print an answer while it comes, and end its line; an interrupt ends the line, too, and is passed on.

    Stops when nobody reads any more: `| head -c 100` should not cost the rest of a long answer.
    """
    try:
        for piece in tidy(pieces):
            print(piece, end="", flush=True)  # into a file or a pipe the same text goes
            if unheard():
                break
    finally:
        print(flush=True)
