"""Kill commands at random moments: repeated, each continues and ends as an undisturbed run would.

Each trial kills a command with kill -9, up to KILLS times, at moments drawn from its running time, and then lets it
end. It must leave what an undisturbed run leaves: the same bytes, no scratch, correct checksums.
"""

import math
import random
import shutil
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tools.trust_commands import CASES, Case, Home, contents, difference, kill, run, start
from tools.trust_trials import Trial, part

TRIALS, KILLS = 16, 3  # of each case; kills of each trial
LATE = 1.2  # kills come within this many times of what the command takes
# Said of one that was killed as it ended.
DONE = ("is complete: there is nothing to resume", "holds a model already", "is not empty", "exists already")


def trials(home: Home, share: float) -> list[Trial]:
    """TRIALS of each case; for a share, of evenly spaced cases."""
    cases = part([case for case in CASES for _ in range(TRIALS)], share)
    return [Trial(case.name, reference(home, case).kill_and_go_on) for case in cases]


@cache
def reference(home: Home, case: Case) -> "Reference":
    """One for all attacks."""
    return Reference(home, case)


class Reference:
    """The files of an undisturbed run, and its running time."""

    def __init__(self, home: Home, case: Case):
        home.try_once(case)
        self.home, self.case = home, case
        folder = home.folder / "references" / case.name
        if case.earlier:
            code, words = run(home, case.line(home, folder, case.earlier), folder)
            assert code == 0, words
            shutil.copytree(folder, folder.with_name(f"{case.name}, earlier"))
        self.folder, self.seconds = folder, math.inf
        for number in range(3):  # the fastest: what else the machine does would send kills too late
            place = folder if number == 0 else self.prepare(folder.with_name(f"{case.name}, {number}"))
            begin = time.monotonic()
            code, words = run(home, case.line(home, place), place)
            self.seconds = min(self.seconds, time.monotonic() - begin)
            assert code == 0, words
        self.contents = contents(folder)

    def prepare(self, folder: Path) -> Path:
        """An empty folder, or the earlier run that is to be replaced."""
        place = folder / "place"
        if self.case.earlier:
            shutil.copytree(self.folder.with_name(f"{self.case.name}, earlier"), place)
        else:
            place.mkdir(parents=True)
        return place

    def kill_and_go_on(self, folder: Path, draws: random.Random) -> int:
        """Returns the number of kills that met a living command."""
        place, killed = self.prepare(folder), 0
        for words in self._words(draws.randint(1, KILLS)):
            child = start(self.home, self.case.line(self.home, place, words), place)
            if not kill(child, draws.uniform(0, LATE) * self.seconds):
                break
            killed += 1
            self._check_killed(place)
        self.finish(place)
        return killed

    def finish(self, place: Path) -> None:
        """Let the command end, if it has not, and compare its files with those of an undisturbed run."""
        line = self.case.line(self.home, place, self.case.again or self.case.words)
        code, words = run(self.home, line, place)
        assert code == 0 or (code == 2 and any(said_ in words for said_ in DONE)), f"it ends with {code}: {words}"
        self.check(place)

    def check(self, place: Path) -> None:
        wrong = difference(contents(place), self.contents)
        assert not wrong, wrong
        if self.case.name not in ("block-size", "gguf", "grade"):  # one file, which has no checksum
            inside = {"fetch": "smollm2-135m", "tournament": "games.jsonl"}.get(self.case.name, "")
            target = place / self.case.out / inside
            code, words = run(self.home, ["verify", str(target), "--quiet"], place)
            assert code == 0, f"verify ends with {code}: {words}"

    def _words(self, number: int) -> Iterator[str]:
        yield self.case.words
        for _ in range(number - 1):
            yield self.case.again or self.case.words

    def _check_killed(self, place: Path) -> None:
        """At any moment, an adapter under its name is whole, and an earlier one exists somewhere."""
        if not self.case.earlier:
            return
        name = "adapter/adapter_model.safetensors"
        earlier = (self.folder.with_name(f"{self.case.name}, earlier") / "out" / name).read_bytes()
        new = (self.folder / "out" / name).read_bytes()
        there = [path.read_bytes() for path in place.rglob(Path(name).name)]
        assert earlier in there or new in there, "neither the earlier adapter nor the new one is there"
        named = place / "out" / name
        assert not named.parent.exists() or named.read_bytes() in (earlier, new), "the adapter is not whole"
