"""Compare recorded runs of several settings: means, paired differences and what they say about a claim.

    rows = read_ablations()
    difference = paired(rows, "dora r=16", "lora r=16")    -> Interval of the difference in held-out loss
    verdict(difference, "lower")                           -> "seen here"

In: rows of bench/ablations.py, one for each run. Runs of one seed learned the same batches in the same order, whatever
their setting, so a difference is taken seed by seed: what the batches do to both runs alike falls out of it.
An interval holds the mean over all seeds with 95 % confidence if runs are normally distributed: mean +/- t s / sqrt(n),
with Student's t for n - 1 degrees of freedom (4.30 for three seeds). It says nothing about other held-out examples,
which are the same in every run.
Holm's method: S. Holm, A simple sequentially rejective multiple test procedure, 1979. "No difference that matters" is
the two one-sided tests of D. J. Schuirmann, 1987.
Not here: the runs and their page (bench/ablations.py), the file (results_file.py).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from scipy.special import stdtr, stdtrit

from qlora_lab.files.course import course_path
from qlora_lab.files.home import expanded
from qlora_lab.files.results_file import Kind, read_results
from qlora_lab.files.strict_json import LIST, NUMBER, OBJECT, TEXT, or_null, whole

RECORDED = ("data", "ablations.jsonl")  # of the course, which a wheel holds too
SEEN, NOT_SEEN, NOISE = "seen here", "not seen here", "cannot be told from noise here"
MARGIN = 0.05  # nats: 5 % in perplexity. What is smaller does not matter here
CLAIMS = ("lower", "higher", "same")  # what is claimed of a setting beside its reference

RULES = dict.fromkeys(("model", "data", "config", "versions"), OBJECT) | {"setting": TEXT, "seed": whole(0)}
RULES |= {"losses": LIST, "trainable": whole(1), "memory": or_null(whole(1))}  # the ledger does not know every method
RULES |= dict.fromkeys(("loss_before", "loss_after", "seconds"), NUMBER)  # losses: nats per answer token
RULES |= dict.fromkeys(("rouge_l_before", "rouge_l_after"), or_null(NUMBER))  # null: no answers were written
# The setting's name decides nothing: its config does.
ABLATIONS = Kind("ablations", "an ablation", RULES, ("model", "data", "config", "seed", "versions"))


@dataclass(frozen=True)
class Interval:
    """A mean over `n` seeds or questions and its 95 % interval, which is unbounded for a single seed."""

    mean: float
    low: float
    high: float
    n: int


def read_ablations(path: str | Path | None = None) -> list[dict]:
    """Read the rows of a file of ablations; None: those recorded in the repository, data/ablations.jsonl.

    Raises what read_results raises, and FileNotFoundError if there is no file.
    """
    path = course_path(*RECORDED) if path is None else expanded(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: bench/ablations.py of a clone of the repository makes it")
    return read_results(path, ABLATIONS)


def by_setting(rows: Iterable[dict]) -> dict[str, list[dict]]:
    """Group rows by setting, in the order of their first rows. Of two rows of one seed the later one counts."""
    found: dict[str, dict[int, dict]] = {}  # setting -> seed -> row
    for row in rows:
        found.setdefault(row["setting"], {})[row["seed"]] = row
    return {setting: list(seeds.values()) for setting, seeds in found.items()}


def interval(values: Iterable[float]) -> Interval:
    """Return mean and 95 % interval, by Student's t. Raises ValueError for no values.

    >>> interval([1.0, 2.0, 3.0]).mean
    2.0
    """
    values = list(values)
    n = len(values)
    if not n:
        raise ValueError("an interval needs at least one value: record the setting first")
    mean = fmean(values)
    # 0.975: 2.5 % lie beyond either end. One value says nothing of the spread.
    half = float(stdtrit(n - 1, 0.975)) * stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return Interval(mean, mean - half, mean + half, n)


def summary(rows: Iterable[dict], setting: str, field: str = "loss_after") -> Interval:
    """Return the interval of `field` over the seeds of a setting; rows where it is null are left out.

    Raises ValueError for a setting without such rows, and for rows of more than one model.
    """
    chosen = _of_setting(rows, setting, field)
    if len({_model(row) for row in chosen.values()}) > 1:
        raise ValueError(f"the rows of {setting!r} are of more than one model: keep one file for each model")
    return interval(row[field] for row in chosen.values())


def paired(rows: Iterable[dict], setting: str, reference: str, field: str = "loss_after") -> Interval:
    """Return the interval of `field` of `setting` minus that of `reference`, over the seeds that both have.

    Raises ValueError for no common seed, and where two runs of one seed read other data or another model, or were made
    with other versions, on another device or in another dtype.
    """
    rows = list(rows)  # read twice
    ours = _of_setting(rows, setting, field)
    theirs = _of_setting(rows, reference, field)
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        raise ValueError(f"{setting!r} and {reference!r} have no seed in common: record both with the same seeds")
    for seed in seeds:  # equal seeds draw equal batches from equal data only
        if _read(ours[seed]) != _read(theirs[seed]):
            raise ValueError(f"seed {seed} of {setting!r} and of {reference!r} read other data: record both again")
        if different := _made_differently(ours[seed], theirs[seed]):
            words = f"seed {seed} of {setting!r} and of {reference!r}: {different}"
            raise ValueError(f"{words} differ between the two runs: record both again")
    return interval(ours[seed][field] - theirs[seed][field] for seed in seeds)


def verdict(difference: Interval, claim: str, margin: float = MARGIN) -> str:
    """Say what a paired difference shows of a claim: "seen here", "not seen here" or "cannot be told from noise here".

    claim: "lower", "higher" or "same". margin: the smallest difference that matters, in units of the difference.
    One rule for all claims. An interval within the margin: the two are the same. Otherwise, an interval beside zero:
    they differ, to that side (size_is_open says whether by more than the margin). Otherwise noise.
    Raises ValueError for another claim, and for a margin of 0 or less.
    """
    if claim not in CLAIMS:
        raise ValueError(f"claim is {claim!r}, but it must be one of {', '.join(CLAIMS)}")
    found = _relation(difference, margin)
    if found is None:
        return NOISE
    return SEEN if found == claim else NOT_SEEN


def size_is_open(difference: Interval, margin: float = MARGIN) -> bool:
    """Tell whether the two differ, but perhaps by less than `margin`. Raises ValueError for a margin of 0 or less."""
    nearer = min(abs(difference.low), abs(difference.high))
    return _relation(difference, margin) in ("lower", "higher") and nearer < margin


def p_value(difference: Interval, margin: float = MARGIN) -> float:
    """Return the two-sided p of the test that the verdict rests on: 0.05 or less unless the verdict is noise.

    For an interval within the margin: twice the larger p of the two one-sided tests against -margin and margin.
    Otherwise: the p of Student's t against zero. One seed: 1. Raises ValueError for a margin of 0 or less.
    """
    same = _relation(difference, margin) == "same"
    distance = margin - abs(difference.mean) if same else abs(difference.mean)
    if difference.n < 2:
        return 1.0
    error = (difference.high - difference.mean) / float(stdtrit(difference.n - 1, 0.975))
    if not error:  # all seeds differ by the same number
        return 0.0 if distance else 1.0
    return 2 * float(stdtr(difference.n - 1, -distance / error))


def surviving(differences: Iterable[Interval], margin: float = MARGIN) -> list[bool]:
    """Tell which verdicts also hold if all are judged together, by Holm's method.

    The chance that any of them is wrong is then at most 5 %, however the differences hang together. For a true
    difference at most one of the two tests of p_value can be wrong, so each difference counts once.

    >>> surviving([Interval(1.0, 0.9, 1.1, 3), Interval(1.0, 0.0, 2.0, 3)])
    [True, False]
    """
    chances = [p_value(difference, margin) for difference in differences]
    holds = [False] * len(chances)
    for rank, place in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        if chances[place] > 0.05 / (len(chances) - rank):
            break  # larger ones fail as well
        holds[place] = True
    return holds


def _relation(difference: Interval, margin: float) -> str | None:
    """Return what the interval shows: "same", "lower" or "higher"; None for noise."""
    if margin <= 0:  # no interval of real runs lies within zero of zero
        raise ValueError(f"margin is {margin}: it must be above 0")
    if -margin <= difference.low and difference.high <= margin:
        return "same"
    return "higher" if difference.low > 0 else "lower" if difference.high < 0 else None


def _of_setting(rows: Iterable[dict], setting: str, field: str) -> dict[int, dict]:
    """Return seed -> row, of the rows of `setting` that have `field`."""
    grouped = by_setting(rows)
    chosen = {row["seed"]: row for row in grouped.get(setting, []) if row[field] is not None}
    if not chosen:
        known = ", ".join(grouped) or "none"
        raise ValueError(f"no row of {setting!r} has {field!r}: the settings are {known}")
    return chosen


def _model(row: dict) -> str:
    return row["model"]["weights_sha256"]


def _read(row: dict) -> tuple[str, str]:
    # the tokens are those that were learned and those that were tested
    return _model(row), row["data"]["tokens_sha256"]


def _made_differently(ours: dict, theirs: dict) -> str:
    """Return what differs between two rows besides their setting; empty for a pair."""
    names = [name for name in ("device", "dtype") if ours["config"].get(name) != theirs["config"].get(name)]
    names += ["versions"] if ours["versions"] != theirs["versions"] else []
    return " and ".join(names)
