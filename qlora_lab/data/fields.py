"""Fields of a record other than its texts: honoured, refused or ignored.

Source: the data formats of OpenAI, Axolotl, LLaMA-Factory, ms-swift and TRL.

A field that means something in one of these formats is honoured or refused by name: ignoring it would train a different
model from the one that was asked for. Empty values (null, [], "", {}) ask for nothing.
"""

from collections.abc import Iterable

SWITCHES = ("weight", "train", "training", "loss")  # of a turn: 0 or false means shown but not learned
# Reasons, which end up in errors.
TOOLS = "tools are read from 'tools' of a record, calls from 'tool_calls' of an answer, results from turns of 'tool'"
MEDIA = "sound and video cannot be learned here"
PICTURES = "pictures are read from 'image' or 'images' of the record, and stand where <image> is in a text"
PREFERENCES = "preferences cannot be learned here"
PARTS = "a turn is learned as a whole or not at all"
THOUGHTS = "thoughts are read from 'reasoning_content', or from the text as <think>...</think>"
OPTIONS = "a record cannot set options of the template"
UNSUPPORTED = {
    **dict.fromkeys(("functions", "function_call"), TOOLS),
    "documents": "documents beside the texts cannot be learned here",
    **dict.fromkeys(("audio", "audios", "video", "videos"), MEDIA),
    **dict.fromkeys(("chosen", "rejected", "kto_tag", "rejected_response"), PREFERENCES),
    **dict.fromkeys(("train_detail", "training_detail", "loss_scale"), PARTS),
    **dict.fromkeys(("chat_template", "chat_template_kwargs"), OPTIONS),
}
UNSUPPORTED_IN_RECORDS = UNSUPPORTED | dict.fromkeys(("tool_calls", "tool_call_id"), TOOLS)
UNSUPPORTED_IN_TURNS = UNSUPPORTED | dict.fromkeys(("image", "images"), PICTURES)
UNSUPPORTED_IN_TURNS |= {"tools": TOOLS} | dict.fromkeys(("thinking", "reasoning"), THOUGHTS)


def refuse_unsupported(values: dict, where: str) -> None:
    """Raise ValueError for the first field that asks for something unsupported. where: "record" or "turn"."""
    for name, reason in (UNSUPPORTED_IN_RECORDS if where == "record" else UNSUPPORTED_IN_TURNS).items():
        if not is_empty(values.get(name)):
            raise ValueError(f"the {where} has {name!r}, but {reason}: leave it out")
    for name in SWITCHES if where == "record" else ():  # a record may not ask to count less: only turns have switches
        value = values.get(name)
        off = isinstance(value, int) and value == 0  # false too; 0.0 is no switch but a measured loss
        if off or (name == "weight" and not (is_empty(value) or value == 1)):
            raise ValueError(f"the record has {name!r}: {value!r:.40}, but all records count alike: set it on turns")


def is_learned(turn: dict, role: str) -> bool:
    """Tell whether the turn of `role` is learned: an answer is, unless one of SWITCHES is off.

    Raises ValueError for a switch that is neither on nor off, and for one that is on where there is no answer.
    """
    learned = role == "assistant"
    for name in SWITCHES:
        value = turn.get(name)
        if value is None:
            continue
        if value not in (0, 1):  # false and true too, which equal them
            raise ValueError(f"the turn has {name!r}: {value!r:.40}, but a turn is learned (1, true) or not (0, false)")
        if value and role != "assistant":
            raise ValueError(f"the turn of {role} has {name!r}: {value!r}, but only answers are learned: leave it out")
        learned = learned and bool(value)
    return learned


def unused_fields(values: dict, used: Iterable[str]) -> tuple[str, ...]:
    """Return the names of fields that are ignored but not empty, in alphabetical order."""
    asked = {name for name, value in values.items() if not is_empty(value)}
    return tuple(sorted(printable(name) for name in asked - set(used)))


def printable(name: str) -> str:
    """Spell out halves of surrogate pairs in a name."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_empty(value: object) -> bool:
    """Tell whether a field of this value asks for nothing."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)
