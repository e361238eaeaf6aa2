"""Tools, tool calls and thoughts: what a chat template gets beside roles and texts.

In: fields of a record or a turn, in OpenAI's form or flat. Out: Parts, in the form that transformers' templates expect:

    tools              [{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}]
    tool_calls         [{"type": "function", "function": {"name": ..., "arguments": {...}}}]
    reasoning_content  a text

Arguments may also be written as JSON, and so may the list of tools.

Not here: whether a template shows them (chat_template.py), and where they end in the text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from reprlib import repr as short
from typing import Any

from qlora_lab.data.fields import is_empty
from qlora_lab.files.strict_json import parse

CALL = '{"function": {"name": ..., "arguments": {...}}}'
TOOL = '{"type": "function", "function": {"name": ..., "parameters": ...}}'
THOUGHT = "reasoning_content"
# Exchanges a text for a marker that can be found again in what a template writes.
Marker = Callable[[int, str, str], str]  # turn (-1: a tool), field, text -> text


@dataclass(frozen=True)
class Parts:
    """turns: number of a turn -> its fields for the template. tools: those that the conversation may call."""

    turns: dict[int, dict] = field(default_factory=dict, hash=False)
    tools: list[dict] = field(default_factory=list, hash=False)

    def __bool__(self) -> bool:
        return bool(self.turns or self.tools)

    @property
    def calling(self) -> frozenset[int]:
        """The turns that call a tool."""
        return frozenset(turn for turn, fields in self.turns.items() if "tool_calls" in fields)

    def marked(self, mark: Marker) -> "Parts":
        """Return parts in which `mark` changed each text that a template must show, always in the same order."""
        # a dict keeps its order, so the marks come in the order of the turns
        turns = {turn: _marked_turn(turn, fields, mark) for turn, fields in self.turns.items()}
        return Parts(turns, [_with_name(tool, mark(-1, "tools", tool["function"]["name"])) for tool in self.tools])

    def texts(self) -> list[tuple[int, str, str]]:
        """Return (turn, field, text) of each text that a template must show."""
        found: list[tuple[int, str, str]] = []

        def note(turn: int, name: str, text: str) -> str:
            found.append((turn, name, text))
            return text

        self.marked(note)  # for its visits, not for what it returns
        return found


def _marked_turn(turn: int, fields: dict, mark: Marker) -> dict:
    changed = dict(fields)  # Parts are frozen, and others may hold the same fields
    if THOUGHT in fields:
        changed[THOUGHT] = mark(turn, THOUGHT, fields[THOUGHT])
    if "tool_calls" in fields:
        changed["tool_calls"] = [_marked_call(turn, call, mark) for call in fields["tool_calls"]]
    return changed


def _marked_call(turn: int, call: dict, mark: Marker) -> dict:
    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return mark(turn, "tool_calls", value)
        if isinstance(value, dict):
            # names of arguments are texts that a template writes, too
            return {changed(name): changed(inner) for name, inner in value.items()}
        return [changed(inner) for inner in value] if isinstance(value, list) else value

    return call | {"function": {part: changed(value) for part, value in call["function"].items()}}


def _with_name(tool: dict, name: str) -> dict:
    return tool | {"function": tool["function"] | {"name": name}}


def read_tools(record: dict) -> list[dict]:
    """Return the tools of a record. Raises ValueError for what is no list of them."""
    tools = record.get("tools")
    if is_empty(tools):
        return []
    if isinstance(tools, str):  # a table has one type a column, so data sets store lists as JSON
        tools = parse(tools, "'tools'", expected="a JSON list")
    if not isinstance(tools, list):
        raise ValueError(f"'tools' is {short(tools)}, but must be a list like [{TOOL}]")
    return [{"type": "function", "function": _function(tool, "a tool", TOOL)} for tool in tools]


def read_fields(turn: dict, role: str) -> dict:
    """Return the fields of a turn that its template gets. Raises ValueError for one that is not as it must be."""
    fields = {}
    for name in ("tool_calls", THOUGHT):
        # a data set gives every turn every field, mostly empty
        if not is_empty(turn.get(name)) and role != "assistant":
            raise ValueError(f"the turn of {role} has {name!r}, but only an answer may have it: leave it out")
    if not is_empty(turn.get(THOUGHT)):
        fields[THOUGHT] = _checked(turn[THOUGHT], THOUGHT)
    if not is_empty(turn.get("tool_calls")):
        calls = turn["tool_calls"]
        if not isinstance(calls, list):
            raise ValueError(f"'tool_calls' is {short(calls)}, but must be a list like [{CALL}]")
        fields["tool_calls"] = [_call(call) for call in calls]
    for name in ("tool_call_id", "name") if role == "tool" else ():
        if not is_empty(turn.get(name)):
            fields[name] = _checked(turn[name], name)
    return fields


def _call(call: Any) -> dict:
    function = _function(call, "a tool call", CALL)
    name = function["name"]
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse(arguments, f"the arguments of {name!r}")
    # OpenAI writes a call without arguments as "", as "{}" or not at all
    if is_empty(arguments) or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {name!r} are {short(arguments)}, but must be a JSON object, or its text")
    known = {"id": _checked(call["id"], "id")} if not is_empty(call.get("id")) else {}
    return known | {"type": "function", "function": {"name": name, "arguments": arguments}}


def _function(value: Any, what: str, form: str) -> dict:
    """Return the function of a tool or a call, which may also be written flat, without "function"."""
    function = value.get("function", value) if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{what} is {short(value)}, but must be like {form}, with a name")
    # flat, "type" is the kind of tool ("function"); inside "function" it would be the user's own
    return {key: inner for key, inner in function.items() if key != "type" or function is not value}


def _checked(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text, found {short(value)}")
    return value
