"""Let the n-th disk operation of a command fail, for every n: by a full disk, and by kill -9.

In: a small run of each command, whose operations are counted first (tests/faults.py). The command succeeds, or ends
with one line. A second try ends as an undisturbed run would.
"""

import os
import random
import signal
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.faults import disk_faults
from tools.trust_commands import CASES, Case, Home, end, said, start
from tools.trust_kills import Reference, reference
from tools.trust_trials import Trial, part

NAMES = ("finetune, evaluated", "finetune, overwrite", "quantize", "sweep", "block-size", "fetch", "grade")
REMOVES = ("unlink", "rmdir")  # what a full disk never refuses


def die(kind: str, path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def trials(home: Home, share: float) -> list[Trial]:
    """A full disk and a kill for each operation of each command; for a share, for evenly spaced operations."""
    found = []
    for case in (small(case) for case in CASES if case.name in NAMES):
        one = reference(home, case)
        for number, kind in part(list(enumerate(operations(one), 1)), share):
            found.append(Trial(f"{case.name}, kill -9", partial(fault, one, number, {"fail": die})))
            if kind not in REMOVES:
                lasting = {"lasting": number % 2 == 0}  # every other disk stays full
                found.append(Trial(f"{case.name}, full disk", partial(fault, one, number, lasting)))
    return found


def small(case: Case) -> Case:
    """The command with fewer steps, because each of its operations costs two runs."""
    words = {"--steps 8 --save-every 2": "--steps 3 --save-every 1", "--eval-every 2": "--eval-every 1"}
    lines = [case.words, case.again, case.earlier]
    for many, few in words.items():
        lines = [line.replace(many, few) for line in lines]
    return replace(case, name=case.name.removeprefix("finetune, "), words=lines[0], again=lines[1], earlier=lines[2])


def operations(one: Reference) -> list[str]:
    """The kinds of all operations of an undisturbed run."""
    place = one.prepare(one.folder.with_name(f"{one.case.name}, counted"))
    file = place.with_name("operations")

    @contextmanager
    def counted():
        with disk_faults(place) as seen:
            yield
        file.write_text("\n".join(kind for kind, _ in seen.operations))

    assert end(start(one.home, one.case.line(one.home, place), place, counted)) == 0
    return file.read_text().splitlines()


def fault(one: Reference, number: int, options: dict, folder: Path, draws: random.Random) -> int:
    """Let operation `number` fail, then repeat the command."""
    place = one.prepare(folder)
    child = start(one.home, one.case.line(one.home, place), place, partial(disk_faults, place, number, **options))
    code, words = end(child), said(place, child)
    assert code in (0, 2, -signal.SIGKILL) and "Traceback" not in words, f"operation {number}: {code}: {words}"
    lines = [line for line in words.splitlines() if line.startswith("qlora-lab ")]
    assert code != 2 or len(lines) >= 1, f"operation {number} is not told in a line: {words}"
    try:
        one.finish(place)
    except AssertionError as error:
        raise AssertionError(f"operation {number}, which ended with {code}: {error}") from None
    return 1
