"""What several commands read: the model with its options, its share in 4 bits, and a text to predict."""

import argparse
import sys
from pathlib import Path

import qlora_lab as ql
from qlora_lab.cli.options import add_field, add_fields, common, whole
from qlora_lab.train.run_options import METHOD_OPTIONS, ModelOptions
from qlora_lab.train.torchrun import rank

DOUBLE_QUANT = {"off": [False], "on": [True], "both": [False, True]}


def add_model(group) -> None:
    """Add the options of a model that is loaded."""
    add_field(group, ModelOptions, "model")
    add_quantization(group)
    add_fields(group, ModelOptions, "also", "dtype")


def add_quantization(group) -> None:
    """Add the options of a model that is quantised while it is loaded or copied."""
    add_fields(group, ModelOptions, "codebook", "block_size", "double_quant")


def add_measured(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the model that a measurement is made of, and return the group for its other options."""
    add_field(parser, ModelOptions, "model", positional=True)
    return parser.add_argument_group("model")


def add_double_quant(group, default: str) -> None:
    """Add the choice of a command that measures several models: without double quantization, with it, or both."""
    words = "quantise the scaling constants too; both: measure each codebook without and with it"
    group.add_argument("--double-quant", default=default, choices=tuple(DOUBLE_QUANT), help=words)


def add_rows(parser: argparse.ArgumentParser) -> None:
    """Add the file of a measurement that goes on where it was interrupted."""
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, metavar="FILE", help="file for the results; existing rows are kept")
    common(output)


def add_text(parser: argparse.ArgumentParser, windows: int, length: int, default: str) -> None:
    """Add the options of a text whose tokens are predicted."""
    add = parser.add_argument_group("data").add_argument
    add("--text", metavar="FILE", help=f"UTF-8 text to predict (default: {default})")
    add("--windows", type=whole, default=windows, metavar="N", help="windows of text to predict")
    add("--length", type=whole, default=length, metavar="TOKENS", help="tokens per window")


def load_model(a: argparse.Namespace):
    """Load the model and its tokenizer, and report how much of it is in 4 bits."""
    codebook = None if a.codebook == "none" else a.codebook  # load's word for it
    dtype = None  # the library chooses
    if a.dtype != "auto":
        import torch

        dtype = getattr(torch, a.dtype)  # one of the choices, so it exists
    options = {"also": a.also, "dtype": dtype, "progress": not a.quiet}
    model, tokenizer = ql.load(a.model, codebook, a.block_size, a.double_quant, **options)
    if codebook:
        from qlora_lab.model.share_in_4_bits import in_4_bits

        print_share(a, in_4_bits(model))
    return model, tokenizer


def print_share(a: argparse.Namespace, share) -> None:
    """Print a Share, how much of a model is in 4 bits, as a note."""
    if share.is_enough:  # load has warned of a share that is too small
        print_note(a, str(share))


def print_note(a: argparse.Namespace, text: str) -> None:
    """Print a line to stderr, where progress goes; stdout holds results."""
    if not (a.json or a.quiet):  # other processes than the first are quiet
        print(text, file=sys.stderr)


def is_first_process() -> bool:
    """Whether this is the one of torchrun's processes that writes and prints."""
    return rank() == 0


def add_adapters(a: argparse.Namespace, model, tokenizer) -> None:
    """Put the adapters of --method into the model."""
    options = {name: getattr(a, name) for name in METHOD_OPTIONS[a.method] if name in a}
    if "targets" in options:
        options["targets"] = targets_of(a)
    if a.method == "prompt" and options["start"] is not None:
        options["tokenizer"] = tokenizer
    ql.add_adapter(model, a.method, seed=a.seed, progress=not a.quiet, **options)


def targets_of(a: argparse.Namespace) -> str | list[str]:
    """Return --targets as add_lora takes it: "all-linear" is one word, not a list of one."""
    return a.targets[0] if len(a.targets) == 1 else a.targets


def read_text(name: str) -> str:
    """Read a UTF-8 file. Raises ValueError for another encoding, naming the byte."""
    from qlora_lab.files.strict_json import check_regular

    check_regular(Path(name))  # a pipe would be waited for without end
    try:
        return Path(name).read_text(encoding="utf-8-sig")  # without the byte order mark that some editors write
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{name} is not UTF-8 text ({where}): save it as UTF-8") from None
