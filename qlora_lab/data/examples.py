"""Examples: a user's records become conversations that end with an answer.

In: records of a file, a list or a data set (records.py). Out: a list of `Example`, one a record, in their order.
There are four forms; the keys of a record tell which it is:

    Alpaca           {"instruction": ..., "input": ..., "output": ...}            input may be left out or empty
    ShareGPT         {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}
    OpenAI messages  {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    completion       {"prompt": ..., "completion": ...}                      each is a text or a list of turns

Of a completion record, the answers in its prompt are shown but not learned. The text of a turn may be a list of parts:
[{"type": "text", "text": ...}, ...].

A record may also have `system` (a text), Alpaca's `history` ([[question, answer], ...]), `tools`, and `image`
or `images` (a path, or a list of them; pictures.py); an answer may have `tool_calls` and `reasoning_content`
(tool_calls.py). A turn with `weight`: 0 or `train`: false is shown but not learned (fields.py). Fields that ask for
something unsupported, such as sound, are refused by name. All others are ignored, and the doctor lists their names.

White space after a text is dropped, and so are blank lines or a single space before it. The indentation of its first
line stays, because it matters in code. (Templates that trim, such as Llama 3's, drop it later.) Answers before the
first question are dropped, since nothing asked for them, and so is everything after the last answer that is learned.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from qlora_lab.data.fields import SWITCHES, is_empty, is_learned, printable, refuse_unsupported, unused_fields
from qlora_lab.data.pictures import FIELDS, PLACEHOLDER, check_placeholders, picture_paths
from qlora_lab.data.records import records
from qlora_lab.data.tool_calls import THOUGHT, Parts, read_fields, read_tools
from qlora_lab.files.home import expanded

FORMS = (
    "Alpaca (instruction, input, output), ShareGPT (conversations: from, value), OpenAI messages "
    "(messages: role, content) or completion (prompt, completion)"
)
ROLES = {"human": "user", "gpt": "assistant"} | {
    name: name for name in ("user", "assistant", "system", "developer", "tool")
}
LEADING = ("system", "developer")  # roles that say how to answer
OTHER_TOOL_ROLES = ("function", "function_call", "observation", "ipython")  # refused by name
# Dropped before a text: blank lines, and a single space, as completion files have it. More space is indentation.
OUTER_SPACE = re.compile(r"\A(?:[^\S\n]*\n)*(?: (?=\S))?")
TEXT_PART = '{"type": "text", "text": ...}'
Turns = tuple[tuple[str, str], ...]  # (role, content) pairs


class Turn(NamedTuple):
    """A turn of a record."""

    role: str
    text: str
    learned: bool
    fields: dict = {}  # noqa: RUF012 - for the template; never changed


@dataclass(frozen=True)
class Example:
    """A conversation of system or developer, user, assistant and tool that ends with an answer or a tool call."""

    messages: Turns
    not_learned: tuple[int, ...] = ()  # positions of answers that are shown but not learned; never the last
    parts: Parts = Parts()  # tools, and what turns hold beside their texts
    unused: tuple[str, ...] = field(default=(), compare=False, repr=False)  # ignored fields of the record
    place: str = field(default="", compare=False, repr=False)  # "data.jsonl, line 3"
    pictures: tuple[Path, ...] = ()  # image files, in the order of <image> in the texts

    def __post_init__(self) -> None:
        for role, content in self.messages:
            if role not in ROLES.values():
                raise ValueError(f"unknown role {role!r}: a role is system, developer, user, assistant or tool")
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
        check_placeholders(self.messages, self.pictures)
        _check_results(self)

    @property
    def prompt(self) -> Turns:
        """The turns before the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last answer: the reference for a model that is asked `prompt`. Each tool call is a line of JSON."""
        calls = self.parts.turns.get(len(self.messages) - 1, {}).get("tool_calls", ())
        lines = [json.dumps(call["function"], ensure_ascii=False, default=repr) for call in calls]
        return "\n".join(filter(None, [self.messages[-1][1], *lines]))


def _check_results(example: Example) -> None:
    """Raise ValueError for a tool call without a result, unless it is the last turn, and for a result of no answer."""
    roles = [role for role, _ in example.messages]
    for i, (role, following) in enumerate(pairwise(roles)):
        if i in example.parts.calling and following != "tool":
            raise ValueError(f"a turn of {following} follows a tool call: put a turn of tool with its result between")
        if following == "tool" and role not in ("assistant", "tool"):
            raise ValueError(f"a turn of tool follows a turn of {role}: it must follow the answer that calls the tool")


def check_text(text: Any, name: str) -> None:
    """Raise ValueError unless `text` is a text in UTF-8: JSON can spell half a surrogate pair, which is not."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be text, found {text!r:.60}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise ValueError(f"{name} holds {half}, half of a surrogate pair and not a character: remove it") from error


class Examples(list[Example]):
    """A list of examples. skipped: for each record that was left out its place and the reason.

    skip_bad: whether an example that cannot be encoded is left out, too.
    """

    def __init__(self, examples: Iterable[Example] = (), skipped: Iterable[str] = (), skip_bad: bool = False) -> None:
        super().__init__(examples)
        self.skipped: list[str] = list(skipped)
        self.skip_bad = skip_bad


def read_examples(source: str | Path | Iterable, skip_bad: bool = False) -> Examples:
    """Make an example of each record of a file, a list or a data set; an `Example` in a list stays as it is.

    Raises FileNotFoundError for a missing file, ValueError for an empty one and for the first record that cannot be
    used. The message names the file, the line (of JSON lines, from 1) or the record (of a list, from 1), and the fix.
    skip_bad: leave such records out; ValueError if no other is left.
    """
    examples = Examples()
    folder = expanded(source).parent if isinstance(source, (str, Path)) else Path()  # where its pictures are named from
    for place, read in records(source):
        try:
            examples.append(_read(read, place, folder))
        except ValueError as error:
            if not skip_bad:
                raise
            examples.skipped.append(str(error))
    if not examples:
        check_any_left(examples.skipped)
        if not isinstance(source, (str, Path)):
            raise ValueError("there are no examples: give at least one")
        raise ValueError(f"{source} holds no examples: write one JSON object per line, in the form of {FORMS}")
    return examples


def last_answer_only(examples: Iterable[Example]) -> Examples:
    """Return the examples with every answer but the last shown and not learned."""
    kept = Examples(skipped=getattr(examples, "skipped", ()))
    for example in examples:
        earlier = (i for i, (role, _) in enumerate(example.messages[:-1]) if role == "assistant")
        kept.append(replace(example, not_learned=tuple(earlier)))
    return kept


def _read(read: Callable[[], Any], place: str, folder: Path) -> Example:
    record = read()  # its errors name the place
    try:
        return record if isinstance(record, Example) else to_example(record, place, folder)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def check_any_left(skipped: Sequence[str]) -> None:
    """Raise ValueError if records were skipped: called where none is left."""
    if skipped:
        raise ValueError(f"none of the {len(skipped):,} records can be used; the first: {skipped[0]}")


def to_example(record: Any, place: str = "", folder: Path = Path()) -> Example:  # noqa: B008 - frozen
    """Make an Example of a record in any of the forms. Raises ValueError for another, or one without answer.

    folder: where its pictures are named from.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"expected a JSON object in the form of {FORMS}, found {type(record).__name__}")
    refuse_unsupported(record, "record")  # first: its error is the clearest
    example = _in_its_form(record, place)
    if tools := read_tools(record):
        example = replace(example, parts=replace(example.parts, tools=tools))
    pictures = picture_paths(record, folder)
    return replace(example, pictures=pictures) if pictures else example


def _in_its_form(record: Mapping, place: str) -> Example:
    is_alpaca = "instruction" in record and "output" in record
    named = [name for name in ("messages", "conversations") if name in record]
    filled = [name for name in named if not is_empty(record[name])]  # some files have every key, with null in others
    if filled or (named and not is_alpaca):
        name = (filled or named)[0]
        turns, unused = _turns(record[name], name)
        return _conversation(record, turns, unused, (name,), place)
    if is_alpaca:
        return _alpaca(record, place)
    if "prompt" in record and "completion" in record:
        return _completion(record, place)
    raise ValueError(f"the record has the keys {', '.join(map(printable, record)) or '(none)'}; expected {FORMS}")


def _alpaca(record: dict, place: str) -> Example:
    parts = _text(record, "instruction"), _optional_text(record, "input")
    question = "\n\n".join(part for part in parts if part)
    turns = [*_system(record), *_history(record), ("user", question), ("assistant", _text(record, "output"))]
    unused = unused_fields(record, ("instruction", "input", "output", "system", "history", "weight", "tools", *FIELDS))
    return Example(tuple(turns), unused=unused, place=place)


def _history(record: dict) -> list[tuple[str, str]]:
    pairs = [] if is_empty(record.get("history")) else record["history"]
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("'history' must be a list of [question, answer] pairs")
    texts = [_text({"history": text}, "history") for pair in pairs for text in pair]
    return list(zip(["user", "assistant"] * len(pairs), texts, strict=True))


def _completion(record: dict, place: str) -> Example:
    """Learn the answers of the completion; those of the prompt are shown."""
    prompt, unused = _side(record, "prompt", "user")
    completion, more = _side(record, "completion", "assistant")
    turns = [*(turn._replace(learned=False) for turn in prompt), *completion]
    return _conversation(record, turns, unused | more, ("prompt", "completion"), place)


def _side(record: dict, name: str, role: str) -> tuple[list[Turn], set[str]]:
    """Read a prompt or a completion: a list of turns, or the text of one turn of `role`."""
    if isinstance(record[name], list):
        return _turns(record[name], "messages")
    return [Turn(role, _text(record, name), role == "assistant")], set()


def _conversation(record: dict, turns: list[Turn], unused: set[str], used: tuple[str, ...], place: str) -> Example:
    system = [Turn(role, text, False) for role, text in _system(record)]
    if system and any(turn.role in LEADING for turn in turns):
        raise ValueError("the record has both 'system' and a turn of the system: keep one of them")
    first = next((i for i, turn in enumerate(turns) if turn.role == "user"), len(turns))
    turns = system + [turn for i, turn in enumerate(turns) if turn.role != "assistant" or i > first]
    answers = [turn.learned for turn in turns if turn.role == "assistant"]
    if answers and not any(answers):
        raise ValueError("no answer to learn from: all of them have weight 0, or train is false")
    while turns and not (turns[-1].role == "assistant" and turns[-1].learned):
        turns.pop()  # nothing after the last learned answer changes what is learned
    not_learned = tuple(i for i, turn in enumerate(turns) if turn.role == "assistant" and not turn.learned)
    parts = Parts({i: turn.fields for i, turn in enumerate(turns) if turn.fields})
    unused |= set(unused_fields(record, (*used, "system", "weight", "tools", *FIELDS)))
    texts = tuple((turn.role, turn.text) for turn in turns)
    return Example(texts, not_learned, parts, tuple(sorted(unused)), place)


def _turns(turns: Any, name: str) -> tuple[list[Turn], set[str]]:
    """Return (role, text, learned) for each turn, and the names of ignored fields."""
    pairs = [("role", "content"), ("from", "value")]  # either pair under either name, since files mix them
    expected, other = pairs if name == "messages" else pairs[::-1]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"a conversation must be a list of turns with the keys {expected[0]} and {expected[1]}")
    read: list[Turn] = []
    unused: set[str] = set()
    for turn in turns:
        role_key, text_key = other if other[0] in turn and expected[0] not in turn else expected
        role = _role(_text(turn, role_key))
        refuse_unsupported(turn, "turn")
        fields = read_fields(turn, role)
        content = _joined(turn.get(text_key))
        if "tool_calls" in fields and is_empty(content):
            content = ""  # OpenAI writes null beside a call
        read.append(Turn(role, _text({text_key: content}, text_key), is_learned(turn, role), fields))
        used = (role_key, text_key, "tool_calls", THOUGHT, *fields, *SWITCHES)
        unused |= {f"{field} of a turn" for field in unused_fields(turn, used)}
    return read, unused


def _joined(content: Any) -> Any:
    """Join the parts of a content into one text; what is no list stays as it is."""
    if not isinstance(content, list) or not content:
        return content
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image" and len(part) == 1:  # as transformers' templates take it; its path is in 'images'
            continue
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"a part of the content is {_shown(part)}, but only {TEXT_PART} can be learned: leave it out"
            )
    return "".join(part.get("text", PLACEHOLDER) for part in content)


def _system(record: dict) -> list[tuple[str, str]]:
    text = _optional_text(record, "system")
    return [("system", text)] if text else []


def _role(name: str) -> str:
    if name in OTHER_TOOL_ROLES:
        raise ValueError(f"a turn of {name!r} is not read: write calls as 'tool_calls' of an answer, results as 'tool'")
    if name not in ROLES:
        raise ValueError(f"unknown role {name!r}: a role is one of {', '.join(ROLES)}")
    return ROLES[name]


def _text(record: dict, key: str) -> str:
    if not isinstance(record.get(key), str):
        raise ValueError(f"{key!r} must be text, found {_shown(record.get(key))}")
    return OUTER_SPACE.sub("", record[key].rstrip())


def _shown(value: Any) -> str:
    return json.dumps(value, default=repr).strip('"')[:60]  # in Python, a table may hold dates and bytes


def _optional_text(record: dict, key: str) -> str:
    return "" if is_empty(record.get(key)) else _text(record, key)  # some files say null
