"""Examples: what the user brings becomes conversations that end with an answer.

In: a JSON-lines file, or a JSON list, of records. Out: a list of `Example`, one a record, in the file's order.
Three forms are known, and each record is recognised by its keys:

    Alpaca           {"instruction": ..., "input": ..., "output": ...}            input may be left out or empty
    ShareGPT         {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    OpenAI messages  {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}

White space around a text is dropped: chat templates drop it too, and a leading line break would melt into the prompt's
last token. Answers before the first question are dropped, since nothing asked for them, and so is what follows the
last answer, since nothing is learned from it.

Not here: tool calls and images; tokens (data.py).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMS = (
    "Alpaca (instruction, input, output), ShareGPT (conversations: from, value) or OpenAI messages "
    "(messages: role, content)"
)
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
Turns = tuple[tuple[str, str], ...]  # (role, content) pairs


@dataclass(frozen=True)
class Example:
    """A conversation as (role, content) pairs, roles system, user and assistant; the last turn, never the first, is an
    answer.

    >>> Example((("user", "2 + 2?"), ("assistant", "4"))).answer
    '4'
    """

    messages: Turns

    def __post_init__(self) -> None:
        for role, _ in self.messages:
            if role not in ROLES.values():
                raise ValueError(f"unknown role {role!r}: a role is system, user or assistant")
        if not self.messages or self.messages[-1][0] != "assistant":
            raise ValueError("no answer to learn from: a conversation needs a turn of the assistant after a question")
        if self.messages[0][0] == "assistant":
            raise ValueError("the assistant speaks first: a conversation opens with system or user")
        if not any(role == "user" for role, _ in self.messages):
            raise ValueError("nothing is asked: a conversation needs a turn of the user")

    @property
    def prompt(self) -> Turns:
        """Everything before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last answer: the reference when the model is asked `prompt`."""
        return self.messages[-1][1]


def read_examples(path: str | Path) -> list[Example]:
    """All records of a JSON-lines file or JSON list, as examples.

    Raises FileNotFoundError for a missing file, ValueError for an empty one and for the first record that cannot be
    used; the message names the file, the line (of JSON lines, from 1) or the record (of a list, from 1), and the fix.
    """
    path = Path(path)
    examples = []
    for place, record in _records(path):
        try:
            examples.append(to_example(record))
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from error
    if not examples:
        raise ValueError(f"{path} holds no examples: write one JSON object a line, in the form of {FORMS}")
    return examples


def to_example(record: Any) -> Example:
    """One record of any of the three forms -> Example; ValueError if it is none of them or has no answer.

    >>> to_example({"instruction": "Add.", "input": "2, 2", "output": "4"}).prompt
    (('user', 'Add.\\n\\n2, 2'),)
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object in the form of {FORMS}, found {type(record).__name__}")
    if "messages" in record:
        return _conversation(record["messages"], "role", "content")
    if "conversations" in record:
        return _conversation(record["conversations"], "from", "value")
    if "instruction" in record and "output" in record:
        return _alpaca(record)
    raise ValueError(f"the record has the keys {', '.join(record) or '(none)'}; expected {FORMS}")


def _alpaca(record: dict) -> Example:
    extra = _text({"input": record.get("input") or ""}, "input")  # some files say null
    question = f"{_text(record, 'instruction')}\n\n{extra}".strip()
    return Example((("user", question), ("assistant", _text(record, "output"))))


def _conversation(turns: Any, role_key: str, text_key: str) -> Example:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"a conversation must be a list of turns with the keys {role_key} and {text_key}")
    messages = [(_role(_text(turn, role_key)), _text(turn, text_key)) for turn in turns]
    while messages and messages[0][0] == "assistant":
        messages.pop(0)
    while messages and messages[-1][0] != "assistant":
        messages.pop()
    return Example(tuple(messages))


def _role(name: str) -> str:
    if name not in ROLES:
        raise ValueError(f"unknown role {name!r}: a role is one of {', '.join(ROLES)}")
    return ROLES[name]


def _text(record: dict, key: str) -> str:
    if not isinstance(record.get(key), str):
        raise ValueError(f"{key!r} must be a text, found {json.dumps(record.get(key))[:60]}")
    return record[key].strip()


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    """("line 3" or "record 3", parsed JSON) for each record of the file."""
    text = _read(path)
    if text.lstrip().startswith("["):
        yield from ((f"record {i}", record) for i, record in enumerate(_parse(text, path, 1, "a JSON list"), 1))
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines() would also split at U+2028, legal inside JSON
        if line.strip():
            yield f"line {number}", _parse(line, path, number, "one JSON object a line")


def _parse(text: str, path: Path, first_line: int, expected: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}, line {first_line + error.lineno - 1}, column {error.colno}"
        raise ValueError(f"{place}: not JSON ({error.msg}); expected {expected}") from error


def _read(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f'no data file at {path}: give a path to a JSON-lines file, or "docstrings"')
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: Windows editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
