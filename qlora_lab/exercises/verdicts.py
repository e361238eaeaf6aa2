"""Keep what `check` found, so that a grader learns it from a file and not from what was printed.

In: a verdict for each check. Out: JSON, {exercise: [verdict, line]}. A student's code can print "correct", or send all
printed text elsewhere; neither changes a grade.
But: it runs in the student's own process. A student who wants to forge a verdict can, and will have read this file.
"""

import json
from pathlib import Path

from qlora_lab.files import disk

PASSED, FAILED, OPEN = "passed", "failed", "not attempted"

_found = {}  # exercise -> (verdict, line) of its last check


def record(name: str, verdict: str, line: str = "") -> None:
    """Keep the verdict on an exercise. line: what is wrong, in one line."""
    _found[name] = verdict, line


def clear() -> None:
    """Forget all verdicts: before the course's own check runs, a student may have called `check` with anything."""
    _found.clear()


def save(file: str) -> None:
    """Write the verdicts since the last `clear` to a new file."""
    disk.write_text(Path(file), json.dumps(_found))
