"""JSON as it is read from disk: strictly, and with errors that name the file, the key and the rule.

In: a path, or a text and what an error calls it. Out: plain Python values, or ValueError in one line.

Python's own reader takes NaN, keeps the last of two equal keys, waits for ever at a FIFO, and its errors name no file.
What a key may hold is a table, name -> Rule; a key that no table names is the reader's own to judge.
Not here: the tables, each beside what reads the file.
"""

import json
import math
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

LARGEST = 16 * 2**20  # bytes: the longest settings of a model, a list of its layers, have a tenth of that
DEEPEST = 64  # lists and objects in one another; a tokenizer.json has about ten


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    what: str
    allows: Callable[[Any], bool]


TEXT = Rule("a text", lambda value: isinstance(value, str))
OBJECT = Rule("a JSON object", lambda value: isinstance(value, dict))
LIST = Rule("a list", lambda value: isinstance(value, list))
SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
NUMBER = Rule("a number", lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max)


def whole(least: int, most: int | None = None) -> Rule:
    """The rule of a whole number from `least` to `most`; None: without an upper limit."""

    def allows(value: Any) -> bool:
        return type(value) is int and value >= least and (most is None or value <= most)

    return Rule(f"a whole number {f'of at least {least}' if most is None else f'from {least} to {most:,}'}", allows)


def or_null(rule: Rule) -> Rule:
    """The same rule, and null."""
    return Rule(f"{rule.what}, or null", lambda value: value is None or rule.allows(value))


def each(rule: Rule) -> Rule:
    """The rule of an object whose values all follow `rule`."""
    return Rule(
        f"a JSON object, each value {rule.what}",
        lambda value: isinstance(value, dict) and all(map(rule.allows, value.values())),
    )


# ---------------------------------------------------------------------------------------------------------------- files


def check_regular(path: Path) -> None:
    """Raise ValueError unless `path` is a file, or a link to one: a FIFO would be waited for. OSError as of stat."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise ValueError(f"{path} is {kind}, but a regular file is read here: put one in its place")


def read_regular(path: Path, largest: int = LARGEST) -> bytes:
    """The content of a file. Raises as check_regular does, and ValueError for more than `largest` bytes."""
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        size = f"{path.stat().st_size / 2**20:,.1f} MiB"
        raise ValueError(
            f"{path} has {size}, but at most {largest / 2**20:,.0f} are read: it is not what its name says"
        )
    return content


def read_json(
    path: Path,
    rules: Mapping[str, Rule] | None = None,
    needed: Iterable[str] = (),
    *,
    largest: int = LARGEST,
    infinity: bool = False,
) -> dict:
    """The JSON object in a file, its keys as `rules` ask, `needed` all there.

    infinity: take the word Infinity, which Python's own writer puts where JSON has nothing.
    Raises ValueError with the file, the key and the rule; OSError for a file that is not there or may not be read.
    """
    text = decoded(read_regular(path, largest), str(path))
    found = parse(text, str(path), infinity=infinity)
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {short(found)}: it must be a JSON object")
    if "\\u" in text:
        _check_characters(found, str(path))
    check_keys(found, rules or {}, str(path), needed)
    return found


def decoded(content: bytes, where: str) -> str:
    """UTF-8 as text. Raises ValueError for another encoding, and for a byte order mark."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    if text.startswith("\ufeff"):
        raise ValueError(f"{where} begins with a byte order mark: save it as UTF-8 without one")
    return text


# ----------------------------------------------------------------------------------------------------------------- text


class _RefusedError(ValueError):
    """What JSON has no word for, or forbids."""


def parse(
    text: str, where: str, *, line: int | None = None, expected: str = "a JSON object", infinity: bool = False
) -> Any:
    """The value that `text` spells.

    where: what an error calls the text. line: the text's first line in its file, for a file that is read in parts.
    Raises ValueError, with line and column, for what is not JSON; for equal keys, NaN, numbers that Python has no room
    for, and more than DEEPEST lists and objects in one another.
    """
    place = where if line is None else f"{where}, line {line}"
    try:
        found = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_float=_finite,
            parse_constant=_constant if infinity else _no_constant,
        )
    except json.JSONDecodeError as error:
        place = f"{where}, line {(line or 1) + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{place}: {_what_is_wrong(text, error)}; expected {expected}") from None
    except RecursionError:
        raise ValueError(f"{place}: {_TOO_DEEP}") from None
    except _RefusedError as error:
        raise ValueError(f"{place}: {error}") from None
    except ValueError:  # of int()
        raise ValueError(f"{place}: a number has too many digits; expected {expected}") from None
    if not _is_flat(found):
        raise ValueError(f"{place}: {_TOO_DEEP}")
    return found


_TOO_DEEP = f"cannot be read: more than {DEEPEST} lists and objects in one another"


def _what_is_wrong(text: str, error: json.JSONDecodeError) -> str:
    if not text.strip():
        return "it is empty"
    cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    return "it ends too early" if cut else f"not JSON ({error.msg})"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _RefusedError(f"the key {short(repeated)} is there twice: keep one of them")
    return found


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise _RefusedError(f"the number {short(digits)} is too large: write one below 1.8e308")
    return number


def _no_constant(word: str) -> None:
    raise _RefusedError(f"{word} is not JSON: write a number, or null")


def _constant(word: str) -> float:
    return float(word) if word != "NaN" else _no_constant(word)


def _is_flat(found: Any) -> bool:
    """Whether no value lies deeper than DEEPEST."""
    level = [found]
    for _ in range(DEEPEST):
        parts = [part for part in level if isinstance(part, (dict, list))]
        level = [inner for part in parts for inner in (part.values() if isinstance(part, dict) else part)]
    return not any(isinstance(part, (dict, list)) for part in level)


def _check_characters(found: dict, where: str) -> None:
    """Raise ValueError for half of a surrogate pair, which JSON can spell and no text can hold."""
    try:
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{where} holds {half}, half of a surrogate pair, and so no character: remove it") from None


# ----------------------------------------------------------------------------------------------------------------- keys


def check_keys(found: Mapping[str, Any], rules: Mapping[str, Rule], where: str, needed: Iterable[str] = ()) -> None:
    """Raise ValueError for the first key that is missing, or whose value breaks its rule."""
    for name in needed:
        if name not in found:
            raise ValueError(f"{where} has no {name!r}: it must be {rules[name].what}")
    for name, rule in rules.items():
        if name in found and not rule.allows(found[name]):
            raise ValueError(f"{where} has {name}={short(found[name])}: it must be {rule.what}")
