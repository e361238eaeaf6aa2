"""Start two processes that write to one place: the files come from one of them, never from both.

The second is started within a drawn time of the first. At least one ends well; one that does not says why in a line.
"""

import random
import time
from functools import partial
from pathlib import Path

from tools.trust_commands import CASES, Case, Home, contents, difference, end, kill, said, start
from tools.trust_kills import Reference, reference
from tools.trust_trials import Trial, part

TRIALS = 13  # of each case: 117 pairs
NAMES = (
    "finetune, plain",
    "finetune, evaluated",
    "finetune, overwrite",
    "quantize",
    "sweep",
    "block-size",
    "fetch",
    "grade",
)
RESUME = "finetune, both resume"


def trials(home: Home, share: float) -> list[Trial]:
    """TRIALS of each case; for a share, of evenly spaced cases."""
    cases = {case.name: case for case in CASES if case.name in NAMES}
    names = part([name for name in (*cases, RESUME) for _ in range(TRIALS)], share)
    return [Trial(name, _check(home, cases.get(name))) for name in names]


def _check(home: Home, case: Case | None):
    if case is None:
        return partial(race_to_resume, reference(home, CASES[0]))
    return partial(race, reference(home, case), reference(home, case.rival()))


def race(one: Reference, other: Reference, folder: Path, draws: random.Random) -> int:
    """Start both. If only one may have the folder, the other is refused."""
    place = one.prepare(folder)
    codes = _both(one.home, [one.case, other.case], place, draws, again=False)
    ended_well = [each for each, code in zip((one, other), codes, strict=True) if code == 0]
    shared = "--overwrite" in one.case.words or one is other
    assert len(ended_well) == 1 or (ended_well and (shared or one.case.name == "block-size")), f"exit codes {codes}"
    found = contents(place)
    wrong = [difference(found, each.contents) for each in ended_well]
    assert "" in wrong, f"what lies there is neither's: {wrong}, exit codes {codes}"
    return 1


def race_to_resume(one: Reference, folder: Path, draws: random.Random) -> int:
    """Kill a run, then resume it twice at once."""
    place = one.prepare(folder)
    kill(start(one.home, one.case.line(one.home, place), place), draws.uniform(0.2, 0.9) * one.seconds)
    _both(one.home, [one.case, one.case], place, draws, again=True)
    one.check(place)
    return 1


def _both(home: Home, cases: list[Case], place: Path, draws: random.Random, again: bool) -> list[int]:
    """Exit codes."""
    children = []
    for case in cases:
        children.append(start(home, case.line(home, place, case.again if again else case.words), place))
        if len(children) == 1:  # the second does not wait for it, or as long as it may take
            time.sleep(draws.choice([0, 0, draws.uniform(0, 0.4)]))
    codes = [end(child) for child in children]
    for code, child in zip(codes, children, strict=True):
        words = said(place, child)
        lines = [line for line in words.splitlines() if line.startswith("qlora-lab ")]
        assert code in (0, 2) and "Traceback" not in words, f"ends with {code}: {words}"
        assert code == 0 or len(lines) == 1, f"is refused in other than one line: {words}"
    return codes
