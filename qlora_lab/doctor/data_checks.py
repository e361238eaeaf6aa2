"""What the doctor sees in the data before any step: what records ask for, and what the template makes of their texts.

In: examples, and the notes of those that were encoded. Out: a Finding each.
Source: the threads in doctor_checks.THREADS.

Not here: tokens and labels (checks.py); reading records (examples.py, fields.py).
"""

from collections import Counter
from collections.abc import Sequence

from qlora_lab.data.examples import Example
from qlora_lab.data.labels import Notes
from qlora_lab.doctor.checks import ASKED, TEXTS, Finding, _finding


def asked_for(examples: Sequence[Example]) -> Finding:
    """Turns by role, answers that are shown and not learned, and fields that were passed over, of all examples."""
    if not examples:
        return _finding(ASKED, "ok", "not seen: the data came as tokens")
    roles = Counter(role for example in examples for role, _ in example.messages)
    turns = ", ".join(f"{roles[role]:,} {role}" for role in ("system", "user", "assistant") if roles[role])
    message = f"{len(examples):,} examples with the turns {turns}"
    if masked := sum(len(example.not_learned) for example in examples):
        message += f"; {masked:,} of the answers shown and not learned, as their records ask"
    unused = Counter(name for example in examples for name in example.unused)
    if unused:
        message += f"; fields not used: {', '.join(f'{name} ({count:,})' for name, count in unused.most_common())}"
    return _finding(ASKED, "ok", message)


def texts(notes: Notes, seen: int, as_tokens: bool = False) -> Finding:
    """Whether the template shows all answers as they are, and whether texts spell its control tokens.

    notes: summed over the `seen` examples that were encoded. as_tokens: they came so, and nobody may have taken notes.
    """
    lines = notes.warnings()
    if spelt := notes.control_texts:
        tokens = f"a control token is spelt {spelt:,} times in texts" if spelt > 1 else "a text spells a control token"
        lines.insert(0, f"{tokens}, and encoded as text: if it was to divide turns, write turns")
    if lines:
        return _finding(TEXTS, "warning", f"in {seen} examples: {'; '.join(lines)}")
    if as_tokens:
        return _finding(TEXTS, "ok", "not seen: the data came as tokens")
    return _finding(TEXTS, "ok", f"in {seen} examples all answers are shown whole, and no text spells a control token")
