"""Read JSON from disk strictly, with errors that name the file, the key and the rule.

Python's reader accepts NaN, keeps the last of two equal keys, waits for ever at a FIFO, and its errors name no file.
A table, name -> Rule, says what each key may hold. It lies with the code that reads the file, which judges other keys.
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

LARGEST = 16 * 2**20  # bytes: ten times the longest settings of a model, a list of its layers
MOST_DIGITS = 4_300  # of a whole number: Python's own limit, which a user can lift; reading a million takes seconds
DEEPEST = 64  # nested lists and objects; a tokenizer.json has about ten levels


class Rule(NamedTuple):
    what: str  # in words, for errors
    allows: Callable[[Any], bool]


TEXT = Rule("a text", lambda value: isinstance(value, str))
OBJECT = Rule("a JSON object", lambda value: isinstance(value, dict))
LIST = Rule("a list", lambda value: isinstance(value, list))
SWITCH = Rule("true or false", lambda value: isinstance(value, bool))
NUMBER = Rule("a number", lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max)


def whole(least: int, most: int | None = None) -> Rule:
    """Make the rule of a whole number from `least` to `most`; None: no upper limit."""

    def allows(value: Any) -> bool:
        return type(value) is int and value >= least and (most is None or value <= most)

    return Rule(f"a whole number {f'of at least {least}' if most is None else f'from {least} to {most:,}'}", allows)


def or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.what}, or null", lambda value: value is None or rule.allows(value))


def each(rule: Rule) -> Rule:
    return Rule(
        f"a JSON object, each value {rule.what}",
        lambda value: isinstance(value, dict) and all(map(rule.allows, value.values())),
    )


def check_regular(path: Path) -> None:
    """Raise ValueError unless `path` is a file, or a link to one: opening a FIFO would wait. OSError as of stat."""
    mode = path.stat().st_mode  # stat follows links
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise ValueError(f"{path} is {kind}, but must be a regular file: put one in its place")


def read_regular(path: Path, largest: int = LARGEST) -> bytes:
    """Return the content of a file. Raises as check_regular does, and ValueError for more than `largest` bytes."""
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(largest + 1)  # not the size from stat: the file may be growing
    if len(content) > largest:
        size = f"{path.stat().st_size / 2**20:,.1f} MiB"
        raise ValueError(f"{path} has {size}, but at most {largest / 2**20:,.0f} are read: put the right file there")
    return content


def read_json(
    path: Path,
    rules: Mapping[str, Rule] | None = None,
    needed: Iterable[str] = (),
    *,
    largest: int = LARGEST,
    infinity: bool = False,
) -> dict:
    """Read the JSON object in a file. Its keys follow `rules`, and those in `needed` are all there.

    infinity: accept the word Infinity, which Python writes and JSON lacks.
    Raises ValueError with the file, the key and the rule; OSError for a file that is missing or may not be read.
    """
    text = decoded(read_regular(path, largest), str(path))
    content = parse(text, str(path), infinity=infinity)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {short(content)}: it must be a JSON object")
    if "\\u" in text:  # only an escape can spell half of a surrogate pair
        check_characters(content, str(path))
    check_keys(content, rules or {}, str(path), needed)
    return content


def decoded(content: bytes, where: str) -> str:
    """Decode UTF-8. Raises ValueError for another encoding, and for a byte order mark."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    if text.startswith("\ufeff"):
        raise ValueError(f"{where} begins with a byte order mark: save it as UTF-8 without one")
    return text


class _RefusedError(ValueError):
    """Raised inside json.loads for what JSON forbids or has no word for."""


def parse(
    text: str, where: str, *, line: int | None = None, expected: str = "a JSON object", infinity: bool = False
) -> Any:
    """Return the value that `text` spells.

    where: what an error calls the text. line: number of its first line in the file, for a file that is read in parts.
    Raises ValueError, with line and column, for what is not JSON; also for equal keys, NaN, numbers too large for
    Python, and more than DEEPEST nested lists and objects.
    """
    place = where if line is None else f"{where}, line {line}"
    try:
        value = json.loads(
            text,
            object_pairs_hook=_without_repeats,
            parse_float=_finite,
            parse_int=_whole,
            parse_constant=_constant if infinity else _no_constant,
        )
    except json.JSONDecodeError as error:
        place = f"{where}, line {(line or 1) + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{place}: {_what_is_wrong(text, error)}; expected {expected}") from None
    except RecursionError:
        raise ValueError(f"{place}: {_TOO_DEEP}") from None
    except _RefusedError as error:
        raise ValueError(f"{place}: {error}") from None
    if not _is_flat(value):
        raise ValueError(f"{place}: {_TOO_DEEP}")
    return value


_TOO_DEEP = f"cannot be read: more than {DEEPEST} nested lists and objects"


def _what_is_wrong(text: str, error: json.JSONDecodeError) -> str:
    if not text.strip():
        return "it is empty"
    cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
    return "it ends too early" if cut else f"not JSON ({error.msg})"


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        repeated, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise _RefusedError(f"the key {short(repeated)} appears twice: keep one of them")
    return content


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise _RefusedError(f"a number has too many digits: write one of at most {MOST_DIGITS:,}")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)  # 1e999 becomes inf
    if math.isinf(number):
        raise _RefusedError(f"the number {short(digits)} is too large: write one below 1.8e308")
    return number


def _no_constant(word: str) -> None:
    raise _RefusedError(f"{word} is not JSON: write a number, or null")


def _constant(word: str) -> float:
    return float(word) if word != "NaN" else _no_constant(word)


def _is_flat(value: Any) -> bool:
    """Tell whether nothing lies deeper than DEEPEST, level by level: recursion is what it protects from."""
    level = [value]
    for _ in range(DEEPEST):
        parts = [part for part in level if isinstance(part, (dict, list))]
        level = [inner for part in parts for inner in (part.values() if isinstance(part, dict) else part)]
    return not any(isinstance(part, (dict, list)) for part in level)


def check_characters(content: dict, where: str) -> None:
    """Raise ValueError for half of a surrogate pair, which JSON can spell but UTF-8 cannot hold."""
    try:
        json.dumps(content, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise ValueError(f"{where} holds {half}, half of a surrogate pair and not a character: remove it") from None


def check_keys(content: Mapping[str, Any], rules: Mapping[str, Rule], where: str, needed: Iterable[str] = ()) -> None:
    """Raise ValueError for the first key that is missing, or whose value breaks its rule."""
    for name in needed:
        if name not in content:
            raise ValueError(f"{where} has no {name!r}: it must be {rules[name].what}")
    for name, rule in rules.items():
        if name in content and not rule.allows(content[name]):
            raise ValueError(f"{where} has {name}={short(content[name])}: it must be {rule.what}")
