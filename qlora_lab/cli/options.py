"""Options of a command: made from the fields of dataclasses, and read strictly from the words of a command line.

In: a dataclass whose fields carry help texts (train/run_options.py), or one word. Out: an option in a group, or the
word's value; a mistake is argparse.ArgumentTypeError, which the parser reports in one line with the option's name.
Python's int and float accept much that nobody means: digits of any script, 1_000, nan, and 1e400, which is infinity.
"""

import argparse
import math
import re
from dataclasses import Field, fields
from typing import Any, NoReturn, get_args, get_origin
from unicodedata import category

DIGITS = 30  # more than 2^63 has
LONGEST = 250  # characters of a word: paths are rarely longer


class Parser(argparse.ArgumentParser):
    """A parser that reports its errors in one line, like every other error, and shows defaults."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=_Formatter, **options)

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required: ") and ": -" not in message:
            # A word is missing, perhaps because --also, --targets and the like take all words up to the next option.
            message += " (write it before the options)"
        self.exit(2, f"{self.prog}: {one_line(message)}; --help shows what is allowed\n")


class _Formatter(argparse.HelpFormatter):
    """Help texts that end with the default, if there is one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        default = action.default
        if isinstance(default, bool) or default in (None, [], (), argparse.SUPPRESS):
            return action.help
        words = " ".join(map(str, default)) if isinstance(default, (list, tuple)) else default
        return f"{action.help} (default: {words})"


def one_line(text: str) -> str:
    """Return `text` for a terminal: no line breaks, control characters spelled out, endless words cut.

    >>> one_line("a layer\\n named \\x1b[2J")
    'a layer named \\\\x1b[2J'
    """
    spelled = "".join(ascii(c)[1:-1] if category(c) in ("Cc", "Cs") else c for c in " ".join(text.split()))
    return re.sub(rf"(\S{{{LONGEST}}})\S+", r"\1...", spelled)


def add_fields(group, owner: type, *names: str) -> None:
    """Add one option for each named field of the dataclass `owner`."""
    for name in names:
        add_field(group, owner, name)


def add_field(group, owner: type, name: str, *, flag: str = "", positional: bool = False, **changes: Any) -> None:
    """Add the option of one field: its default, type and help text are those of the field.

    A switch that is on by default becomes --no-NAME. flag: another name for the option. changes: more for argparse.
    """
    source = owner.__dataclass_fields__[name]  # raises KeyError for a name that is not a field
    text = source.metadata["help"]
    if positional:
        group.add_argument(name, help=text)
        return
    flag = flag or f"--{name.replace('_', '-')}"
    if source.type is bool and source.default:
        group.add_argument(flag.replace("--", "--no-", 1), dest=name, action="store_false", help=f"do not {text}")
    elif source.type is bool:
        group.add_argument(flag, dest=name, action="store_true", help=text)
    else:
        group.add_argument(flag, dest=name, default=source.default, help=text, **_reading(source) | changes)


def _reading(source: Field) -> dict[str, Any]:
    """Return how the words of a field are read: argparse's type, metavar, choices and nargs."""
    unit = source.metadata["unit"]
    types = get_args(source.type) or (source.type,)  # int | None: either
    if source.metadata["choices"]:
        return {"choices": source.metadata["choices"]}
    if unit == "bytes":
        return {"type": size, "metavar": "BYTES"}  # such as 64MiB
    if int in types:  # before float: no field is both
        return {"type": whole, "metavar": (unit or "N").upper()}
    if float in types:
        return {"type": number, "metavar": "X"}
    several = any(get_origin(kind) is tuple for kind in (source.type, *types))  # one word or more
    return {"nargs": "+", "metavar": "NAME"} if several else {}


def from_arguments(owner: type, a: argparse.Namespace) -> Any:
    """Make an `owner` from the arguments that are its fields; a field without an option keeps its default."""
    return owner(**{field.name: getattr(a, field.name) for field in fields(owner) if field.name in a})


def common(parser) -> None:
    """Add the options that every command has."""
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")
    parser.add_argument("--quiet", action="store_true", help="print only results: no progress bars, no notes")


def whole(text: str) -> int:
    """Read a whole number in ASCII digits."""
    if not re.fullmatch(rf"[+-]?[0-9]{{1,{DIGITS}}}", text):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a whole number: give digits, such as 8")
    return int(text)


def number(text: str) -> float:
    """Read a finite number in ASCII digits."""
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?", text) and math.isfinite(float(text)):
        return float(text)
    raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a finite number: give digits, such as 0.5 or 2e-4")


def size(text: str) -> int:
    """Read a number of bytes: "4096", "64KiB", "64MiB" or "2GiB"."""
    if not (match := re.fullmatch(rf"([0-9]{{1,{DIGITS}}}) ?(|KiB|MiB|GiB)", text)):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a size: give bytes, or a number with KiB, MiB or GiB")
    return int(match[1]) * 1024 ** ("", "KiB", "MiB", "GiB").index(match[2])  # KiB = 1024


def levels(text: str) -> tuple[str, list[float]]:
    """Read a name and numbers: "mine=-1,0,1". The library checks whether the numbers can be a codebook."""
    name, _, numbers = text.partition("=")  # a comma in a name would be part of the name
    try:
        table = [number(part.strip()) for part in numbers.split(",")]
    except argparse.ArgumentTypeError:
        table = []
    if not (name.strip() and table):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a codebook: give NAME=V1,V2,... such as mine=-1,0,1")
    return name.strip(), table
