"""What the words of a command line are turned into, strictly: numbers in plain digits, sizes, tables of levels.

In: one word. Out: its value, or argparse.ArgumentTypeError, which the parser tells in one line with the option's name.
Python's int and float take much that nobody means: digits of any script, 1_000, nan, and 1e400, which is infinity.
Not here: which numbers an option allows; the library says that, before a model is loaded.
"""

import argparse
import math
import re
from typing import NoReturn
from unicodedata import category

DIGITS = 30  # more than 2^63 has
LONGEST = 250  # characters of a word: more than a path has, as a rule


class Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line, as every other mistake is told."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}; --help shows what is allowed\n")


def one_line(text: str) -> str:
    """`text` for a terminal: without line breaks, what it would act on spelled out, and no word of endless length.

    >>> one_line("a layer\\n named \\x1b[2J")
    'a layer named \\\\x1b[2J'
    """
    spelled = "".join(ascii(c)[1:-1] if category(c) in ("Cc", "Cs") else c for c in " ".join(text.split()))
    return re.sub(rf"(\S{{{LONGEST}}})\S+", r"\1...", spelled)


def whole(text: str) -> int:
    """A whole number in ASCII digits.

    >>> whole("-12")
    -12
    """
    if not re.fullmatch(rf"[+-]?[0-9]{{1,{DIGITS}}}", text):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a whole number: write digits, such as 8")
    return int(text)


def number(text: str) -> float:
    """A finite number in ASCII digits.

    >>> number("2e-4")
    0.0002
    """
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?", text) and math.isfinite(float(text)):
        return float(text)
    raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a finite number: write digits, such as 0.5 or 2e-4")


def size(text: str) -> int:
    """Bytes: "4096", "64KiB", "64MiB" or "2GiB".

    >>> size("64KiB")
    65536
    """
    if not (match := re.fullmatch(rf"([0-9]{{1,{DIGITS}}}) ?(|KiB|MiB|GiB)", text)):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a size: write bytes, or a number with KiB, MiB or GiB")
    return int(match[1]) * 1024 ** ("", "KiB", "MiB", "GiB").index(match[2])


def levels(text: str) -> tuple[str, list[float]]:
    """A name and numbers: "mine=-1,0,1". Whether the numbers can serve is the library's to say."""
    name, _, numbers = text.partition("=")
    try:
        found = [number(part.strip()) for part in numbers.split(",")]
    except argparse.ArgumentTypeError:
        found = []
    if not (name.strip() and found):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a table: write NAME=V1,V2,... such as mine=-1,-0.5,0,1")
    return name.strip(), found
