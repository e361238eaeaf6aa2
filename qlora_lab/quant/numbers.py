"""Check numbers at public edges: whole or not, within a range, with the name that the caller knows in the error.

Python takes True for 1 and allows integers of any length, which arrays and loops then refuse in words of their own.
"""

from collections.abc import Callable
from reprlib import repr as short
from typing import Any

MOST = 2**31 - 1  # of steps, rows, tokens: more than any run has
MOST_BYTES = MOST_SEED = 2**63 - 1
MOST_FLOAT = 1e300  # Python takes longer integers, which no float holds


def check_whole(name: str, value: Any, least: int = 1, most: int = MOST) -> None:
    """Raise ValueError unless `value` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={short(value)} is not allowed: it is a whole number of at least {least}")
    if value > most:
        raise ValueError(f"{name}={short(value)} is not allowed: it is a whole number of at most {most:,}")


def check_seed(seed: Any) -> None:
    """Raise ValueError unless every random generator accepts `seed`."""
    check_whole("seed", seed, 0, MOST_SEED)


def check_number(name: str, value: Any, allows: Callable[[float], bool], what: str) -> None:
    """Raise ValueError unless `value` is a finite number for which `allows` is true; `what` says it in words."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    too_large = is_number and abs(value) > MOST_FLOAT
    if not is_number or too_large or not allows(value):  # false for NaN
        limit = f", at most {MOST_FLOAT} either way" if too_large else ""
        raise ValueError(f"{name}={short(value)} is not allowed: it is {what}{limit}")
