"""Checks of the data before any step: what the records contain, and how the template changes their texts."""

from collections import Counter
from collections.abc import Sequence

from qlora_lab.data.examples import Example
from qlora_lab.data.labels import Notes
from qlora_lab.doctor.checks import ASKED, TEXTS, Finding, _finding

ORDER = ("system", "developer", "user", "assistant", "tool")  # of roles, in the finding


def asked_for(examples: Sequence[Example], skipped: Sequence[str] = ()) -> Finding:
    """Count turns by role, answers that are shown but not learned, fields not used, and records that were skipped."""
    if not examples:
        return _finding(ASKED, "ok", "not checked: the data came as tokens")
    roles = Counter(role for example in examples for role, _ in example.messages)
    turns = ", ".join(
        f"{roles[role]:,} {role}" for role in ("system", "developer", "user", "assistant", "tool") if roles[role]
    )
    message = f"{len(examples):,} examples with the turns {turns}"
    if pictures := sum(len(example.pictures) for example in examples):
        message += f"; {pictures:,} picture{'s' * (pictures > 1)}"
    if masked := sum(len(example.not_learned) for example in examples):
        message += f"; {masked:,} answers are shown but not learned, as their records ask"
    unused = Counter(name for example in examples for name in example.unused)
    if unused:
        message += f"; fields not used: {', '.join(f'{name} ({count:,})' for name, count in unused.most_common())}"
    if skipped:
        message += f"; {len(skipped):,} skipped, the first: {skipped[0]}"
    return _finding(ASKED, "warning" if skipped else "ok", message)


def texts(notes: Notes, seen: int, as_tokens: bool = False) -> Finding:
    """Check that the template shows all answers unchanged, and that no text spells its control tokens.

    notes: summed over the `seen` examples that were encoded. as_tokens: they arrived encoded, perhaps without notes.
    """
    lines = notes.warnings()
    if spelt := notes.control_texts:
        tokens = f"a control token is spelt {spelt:,} times in texts" if spelt > 1 else "a text spells a control token"
        lines.insert(0, f"{tokens}, and encoded as text: if it should separate turns, write turns instead")
    if lines:
        return _finding(TEXTS, "warning", f"in {seen} examples: {'; '.join(lines)}")
    if as_tokens:
        return _finding(TEXTS, "ok", "not checked: the data came as tokens")
    message = f"in {seen} examples all answers are shown in full, and no text spells a control token"
    return _finding(TEXTS, "ok", message)
