"""Examples: a user's records become conversations that end with an answer.

In: a JSON-lines file, or a JSON list, of records. Out: a list of `Example`, one a record, in the file's order.
There are three forms; the keys of a record tell which it is:

    Alpaca           {"instruction": ..., "input": ..., "output": ...}            input may be left out or empty
    ShareGPT         {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    OpenAI messages  {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}

A record may also have `system` (a text) and Alpaca's `history` ([[question, answer], ...]). A turn with `weight`: 0 or
`train`: false is shown but not learned (fields.py). Fields that ask for something unsupported, such as tools and
images, are refused by name. All others are ignored, and the doctor lists their names.

White space after a text is dropped, and so are blank lines or a single space before it. The indentation of its first
line stays, because it matters in code. (Templates that trim, such as Llama 3's, drop it later.) Answers before the
first question are dropped, since nothing asked for them, and so is everything after the last answer that is learned.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_lab.data.fields import SWITCHES, is_empty, is_learned, printable, refuse_unsupported, unused_fields
from qlora_lab.files.strict_json import parse

FORMS = (
    "Alpaca (instruction, input, output), ShareGPT (conversations: from, value) or OpenAI messages "
    "(messages: role, content)"
)
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")  # refused by name
# Dropped before a text: blank lines, and a single space, as completion files have it. More space is indentation.
OUTER_SPACE = re.compile(r"\A(?:[^\S\n]*\n)*(?: (?=\S))?")
Turns = tuple[tuple[str, str], ...]  # (role, content) pairs


@dataclass(frozen=True)
class Example:
    """A conversation of system, user and assistant that ends with an answer."""

    messages: Turns
    not_learned: tuple[int, ...] = ()  # positions of answers that are shown but not learned; never the last
    unused: tuple[str, ...] = field(default=(), compare=False, repr=False)  # ignored fields of the record
    place: str = field(default="", compare=False, repr=False)  # "data.jsonl, line 3"

    def __post_init__(self) -> None:
        for role, content in self.messages:
            if role not in ROLES.values():
                raise ValueError(f"unknown role {role!r}: a role is system, user or assistant")
            check_text(content, f"the content of the {role} turn")
        if not self.messages or self.messages[-1][0] != "assistant":
            raise ValueError("no answer to learn from: add an assistant turn after a question")
        if self.messages[0][0] == "assistant":
            raise ValueError("the assistant speaks first: start with a system or user turn")
        if not any(role == "user" for role, _ in self.messages):
            raise ValueError("there is no question: add a user turn")
        earlier_answers = {i for i, (role, _) in enumerate(self.messages[:-1]) if role == "assistant"}
        if not set(self.not_learned) <= earlier_answers:
            raise ValueError(f"not_learned={self.not_learned} is not allowed: give positions of earlier answers")

    @property
    def prompt(self) -> Turns:
        """The turns before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last answer: the reference for a model that is asked `prompt`."""
        return self.messages[-1][1]


def check_text(text: Any, name: str) -> None:
    """Raise ValueError unless `text` is a text in UTF-8: JSON can spell half a surrogate pair, which is not."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, found {text!r:.60}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(f"{name} holds {half}, half of a surrogate pair and not a character: remove it") from error


def read_examples(path: str | Path) -> list[Example]:
    """Read all records of a JSON-lines file or JSON list as examples.

    Raises FileNotFoundError for a missing file, ValueError for an empty one and for the first record that cannot be
    used. The message names the file, the line (of JSON lines, from 1) or the record (of a list, from 1), and the fix.
    """
    path = Path(path)
    examples = []
    for place, record in _records(path):
        try:
            examples.append(to_example(record, f"{path}, {place}"))
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from error
    if not examples:
        raise ValueError(f"{path} holds no examples: write one JSON object per line, in the form of {FORMS}")
    return examples


def to_example(record: Any, place: str = "") -> Example:
    """Make an Example of a record in any of the three forms. Raises ValueError for another, or one without answer."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object in the form of {FORMS}, found {type(record).__name__}")
    refuse_unsupported(record, "record")  # first: its error is the clearest
    is_alpaca = "instruction" in record and "output" in record
    named = [name for name in ("messages", "conversations") if name in record]
    filled = [name for name in named if not is_empty(record[name])]  # some files have every key, with null in others
    if filled or (named and not is_alpaca):
        return _conversation(record, (filled or named)[0], place)
    if is_alpaca:
        return _alpaca(record, place)
    raise ValueError(f"the record has the keys {', '.join(map(printable, record)) or '(none)'}; expected {FORMS}")


def _alpaca(record: dict, place: str) -> Example:
    parts = _text(record, "instruction"), _optional_text(record, "input")
    question = "\n\n".join(part for part in parts if part)
    turns = [*_system(record), *_history(record), ("user", question), ("assistant", _text(record, "output"))]
    unused = unused_fields(record, ("instruction", "input", "output", "system", "history", "weight"))
    return Example(tuple(turns), (), unused, place)


def _history(record: dict) -> list[tuple[str, str]]:
    pairs = [] if is_empty(record.get("history")) else record["history"]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("'history' must be a list of [question, answer] pairs")
    texts = [_text({"history": text}, "history") for pair in pairs for text in pair]
    return list(zip(["user", "assistant"] * len(pairs), texts, strict=True))


def _conversation(record: dict, name: str, place: str) -> Example:
    turns, unused = _turns(record[name], name)
    system = [(role, text, True) for role, text in _system(record)]  # (role, text, learned), as turns
    if system and any(role == "system" for role, _, _ in turns):
        raise ValueError("the record has both 'system' and a turn of the system: keep one of them")
    first = next((i for i, (role, _, _) in enumerate(turns) if role == "user"), len(turns))
    turns = system + [turn for i, turn in enumerate(turns) if turn[0] != "assistant" or i > first]
    answers = [learned for role, _, learned in turns if role == "assistant"]  # whether each is learned
    if answers and not any(answers):
        raise ValueError("no answer to learn from: all of them have weight 0, or train is false")
    while turns and not (turns[-1][0] == "assistant" and turns[-1][2]):
        turns.pop()  # nothing after the last learned answer changes what is learned
    not_learned = tuple(i for i, (role, _, learned) in enumerate(turns) if role == "assistant" and not learned)
    unused |= set(unused_fields(record, (name, "system", "weight")))
    return Example(tuple((role, text) for role, text, _ in turns), not_learned, tuple(sorted(unused)), place)


def _turns(turns: Any, name: str) -> tuple[list[tuple[str, str, bool]], set[str]]:
    """Return (role, text, learned) for each turn, and the names of ignored fields."""
    pairs = [("role", "content"), ("from", "value")]  # either pair under either name, since files mix them
    expected, other = pairs if name == "messages" else pairs[::-1]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"a conversation must be a list of turns with the keys {expected[0]} and {expected[1]}")
    read: list[tuple[str, str, bool]] = []
    unused: set[str] = set()
    for turn in turns:
        role_key, text_key = other if other[0] in turn and expected[0] not in turn else expected
        role = _role(_text(turn, role_key))
        refuse_unsupported(turn, "turn")
        read.append((role, _text(turn, text_key), is_learned(turn, role)))
        unused |= {f"{field} of a turn" for field in unused_fields(turn, (role_key, text_key, *SWITCHES))}
    return read, unused


def _system(record: dict) -> list[tuple[str, str]]:
    text = _optional_text(record, "system")
    return [("system", text)] if text else []


def _role(name: str) -> str:
    if name in TOOL_ROLES:
        raise ValueError(f"a turn of {name!r} belongs to a tool call, which cannot be learned here: leave it out")
    if name not in ROLES:
        raise ValueError(f"unknown role {name!r}: a role is one of {', '.join(ROLES)}")
    return ROLES[name]


def _text(record: dict, key: str) -> str:
    if not isinstance(record.get(key), str):
        raise ValueError(f"{key!r} must be text, found {json.dumps(record.get(key))[:60]}")
    return OUTER_SPACE.sub("", record[key].rstrip())


def _optional_text(record: dict, key: str) -> str:
    return "" if is_empty(record.get(key)) else _text(record, key)  # some files say null


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("line 3" or "record 3", parsed JSON) for each record of the file."""
    text = _read(path)
    if text.lstrip().startswith("["):
        records = parse(text, str(path), line=1, expected="a JSON list")
        yield from ((f"record {i}", record) for i, record in enumerate(records, 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() also splits at U+2028, legal in JSON
        if line.strip():
            yield f"line {number}", parse(line, str(path), line=number, expected="one JSON object per line")


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f'no data file at {path}: give a path to a JSON-lines file, or "docstrings"')
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: Windows editors add a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
