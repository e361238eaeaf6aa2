"""Damaged inputs for every parser (tools/fuzz.py), as a part of `make trust`."""

from pathlib import Path

COUNT = 200_000


def results(folder: Path, share: float, seed: int) -> list:
    """A Result for each parser, and one more for each finding."""
    from tools.fuzz import fuzz
    from tools.fuzz_parsers import PARSERS
    from tools.trust_trials import Result

    found = []
    for name, tally in fuzz(list(PARSERS), round(COUNT * share), seed, folder).items():
        found.append(Result(name, tally.read + tally.refused, "", ""))
        found += [Result(name, 1, str(finding), str(folder)) for finding in tally.findings]
    return found
