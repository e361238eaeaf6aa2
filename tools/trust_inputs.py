"""Inputs that lie: drawn for every parser by tools/fuzz.py, a few hundred in a trial; a finding is a broken promise."""

from functools import partial
from pathlib import Path
from random import Random

from tools.trust import Trial
from tools.trust_commands import Home

COUNT, AT_ONCE = 200_000, 1000


def trials(home: Home, share: float) -> list[Trial]:
    """Parser by parser; the name of each is its line in the table."""
    from tools.fuzz import shares
    from tools.fuzz_parsers import PARSERS

    parts = shares(list(PARSERS), round(COUNT * share))
    return [
        Trial(name, partial(drawn, name, min(AT_ONCE, count - start)))
        for name, count in parts.items()
        for start in range(0, count, AT_ONCE)
    ]


def drawn(name: str, count: int, folder: Path, draws: Random) -> int:
    """How many were drawn: `count`."""
    from tools.fuzz import attack, quiet

    with quiet():
        tally = attack(name, folder / name, count, str(draws.getrandbits(64)))
    assert not tally.findings, f"{len(tally.findings)} of {count}: {tally.findings[0]}"
    return tally.count
