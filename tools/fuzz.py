"""Draw damaged inputs for every parser of this library, and count what is read and what is refused.

    python tools/fuzz.py                            200,000 inputs in two processes
    python tools/fuzz.py plan "GGUF" --count 5000 --seed 3
    python tools/fuzz.py plan --input 7b227d        read one input again

A parser may read an input, or refuse it with a documented error of one line. Anything else is a finding: another
exception, a message of several lines, more than SECONDS, more than MEMORY. A finding is printed with its seed and its
input in hexadecimal, and the exit code is 1.

An input that ends in a new place (another line of ours, or another exception) is damaged further. This stands in for
the coverage that atheris would watch, and it is as repeatable as the draws.
"""

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from random import Random
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
if __name__ == "__main__":  # before numba and torch are imported
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

from qlora_lab.cli.options import one_line  # noqa: E402
from tools.fuzz_damage import damaged  # noqa: E402
from tools.fuzz_parsers import PARSERS, Parser  # noqa: E402

COUNT = 200_000
WORKERS = 2
SECONDS = 5
MEMORY = 4 * 2**30
ENOUGH = 10  # inputs of one parser that took SECONDS
KEPT = 200  # inputs that ended somewhere new, for further damage
LONGEST = 2000  # characters of a message
SHOWN = 2000  # bytes of a finding


class Finding(NamedTuple):
    """An input that broke a promise, and how."""

    parser: str
    seed: str
    number: int
    content: bytes
    fault: str

    def __str__(self) -> str:
        shown = self.content.hex() if len(self.content) <= SHOWN else f"{self.content[:SHOWN].hex()}... (cut)"
        return f"{self.parser}, seed {self.seed!r}, input {self.number}: {self.fault}\n    --input {shown}"


class Tally(NamedTuple):
    """How many inputs a parser read and refused, and the findings."""

    read: int
    refused: int
    findings: list[Finding]

    @property
    def count(self) -> int:
        return self.read + self.refused + len(self.findings)


class TooLongError(BaseException):
    """Not an Exception, so that code which catches those does not catch this."""


def attack(name: str, folder: Path, count: int, seed: str) -> Tally:
    """Draw `count` inputs for the parser `name`, which gets `folder`, a new folder, for itself."""
    parser = PARSERS[name]
    draws = Random(f"{seed} {name}")
    folder.mkdir(parents=True)
    corpus = parser.good(folder)
    good = len(corpus)
    seen = set()
    tally = Tally(0, 0, [])
    for content in corpus:  # a good input must be read
        parser.read(content, folder)
    for number in range(count):
        content = damaged(draws.choice(corpus), draws, corpus, parser.structured)
        kind, place = outcome(parser, content, folder)
        if kind == "finding":
            tally = tally._replace(findings=[*tally.findings, Finding(name, seed, number, content, place)])
            if sum(TooLongError.__name__ in finding.fault for finding in tally.findings) == ENOUGH:
                break
        else:
            tally = tally._replace(**{kind: getattr(tally, kind) + 1})
        if place not in seen and len(corpus) < good + KEPT and len(content) < 2**16:
            seen.add(place)
            corpus.append(content)
    return tally


def outcome(parser: Parser, content: bytes, folder: Path) -> tuple[str, str]:
    """("read", ""), ("refused", where and how), or ("finding", what was wrong)."""
    try:
        with limited(SECONDS):
            parser.read(content, folder)
    except parser.errors as error:
        words = str(error.args[0]) if error.args else ""
        length = len(one_line(words))  # on the command line, where endless names are cut
        if len(words.splitlines()) != 1 or length > LONGEST:
            form = f"{len(words.splitlines())} lines of {length:,} characters"
            return "finding", f"{_where(error)}: a message of {form}: {words[:200]!r}"
        return "refused", _where(error)
    except (Exception, TooLongError, SystemExit) as error:
        return "finding", f"{_where(error)}: {' '.join(str(error).split())[:200]}"
    return "read", ""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TooLongError after `seconds`."""

    def ring(*_) -> None:
        raise TooLongError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _where(error: BaseException) -> str:
    """The kind of an error, and the last line of this library that raised or passed it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    ours = [frame for frame in frames if "/qlora_lab/" in frame.filename] or frames
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}"


def shares(names: list[str], count: int) -> dict[str, int]:
    """Share `count` inputs among the parsers by weight; each gets at least 8."""
    whole = sum(PARSERS[name].weight for name in names)
    return {name: max(8, ceil(count * PARSERS[name].weight / whole)) for name in names}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and logs: nobody reads thousands of them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(before)


# ------------------------------------------------------------------------------------------------------------- together


def fuzz(names: list[str], count: int, seed: int, folder: Path, workers: int = WORKERS) -> dict[str, Tally]:
    """Name -> the sum of all workers' tallies. Each worker draws its part of the inputs from a seed of its own."""
    parts = shares(names, max(1, count // workers))
    if workers == 1:
        with quiet():
            return {name: attack(name, folder / name, part, str(seed)) for name, part in parts.items()}
    children = [_fork(parts, f"{seed}.{worker}", folder / str(worker)) for worker in range(workers)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sums: dict[str, Tally] = {}
    for worker, code in enumerate(codes):
        tallies = _results(folder / str(worker))
        if code or tallies.keys() != parts.keys():
            name = next((name for name in parts if name not in tallies), "?")
            fault = f"the process ended with {code} in {name}"
            tallies[name] = Tally(0, 0, [Finding(name, f"{seed}.{worker}", -1, b"", fault)])
        for name, tally in tallies.items():
            before = sums.get(name, Tally(0, 0, []))
            sums[name] = Tally(*(a + b for a, b in zip(before, tally, strict=True)))
    return sums


def _fork(parts: dict[str, int], seed: str, folder: Path) -> int:
    """Start a child that attacks the parsers and writes a line for each tally; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_virtual() + MEMORY, most))
        folder.mkdir(parents=True)
        with (folder / "tallies").open("w") as file, quiet():
            for name, part in parts.items():
                tally = attack(name, folder / name, part, seed)
                findings = [tuple(finding) for finding in tally.findings]
                file.write(repr((name, tally.read, tally.refused, findings)) + "\n")
                file.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _results(folder: Path) -> dict[str, Tally]:
    from ast import literal_eval

    tallies = {}
    for line in (folder / "tallies").read_text().splitlines():
        name, read, refused, findings = literal_eval(line)
        tallies[name] = Tally(read, refused, [Finding(*fields) for fields in findings])
    return tallies


def _virtual() -> int:
    """Bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def table(tallies: dict[str, Tally]) -> str:
    """A line for each parser, and a line of totals."""
    rows = [(name, tally.count, tally.read, tally.refused, len(tally.findings)) for name, tally in tallies.items()]
    rows.append(("all", *(sum(row[i] for row in rows) for i in range(1, 5))))
    lines = [f"{'parser':<26}{'drawn':>9}{'read':>9}{'refused':>9}{'findings':>9}"]
    return "\n".join(lines + [f"{name:<26}{n:>9,}{a:>9,}{b:>9,}{c or '':>9}" for name, n, a, b, c in rows])


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Draw damaged inputs for every parser.")
    parser.add_argument("parsers", nargs="*", help=f"which parsers (default: all): {', '.join(PARSERS)}")
    parser.add_argument("--count", type=int, default=COUNT, help="number of inputs in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: %(default)s)")
    parser.add_argument("--input", metavar="HEX", help="read only this input")
    a = parser.parse_args(argv)
    names = a.parsers or list(PARSERS)
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="qlora-lab-fuzz-"))
    if a.input is not None:
        with quiet():
            PARSERS[names[0]].good(folder)
            print(PARSERS[names[0]].read(bytes.fromhex(a.input), folder))
        return 0
    tallies = fuzz(names, a.count, a.seed, folder)
    shutil.rmtree(folder)
    findings = [finding for tally in tallies.values() for finding in tally.findings]
    shortest = sorted(findings, key=lambda finding: -len(finding.content))  # the last of a kind stays
    kinds = {(finding.parser, finding.fault.split(": ")[0]): finding for finding in shortest}
    for finding in kinds.values():
        print(finding, file=sys.stderr)
    print(table(tallies))
    print(f"seed {a.seed}, {time.monotonic() - start:.0f} s, {WORKERS} processes")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
