"""Attack every command that writes, and count: `make trust`. docs/trust.md explains each count.

    python tools/trust.py                                   everything, in less than 15 minutes on two cores
    python tools/trust.py kills disks --share 0.1 --seed 3  a tenth of two attacks, with other draws

It prints a table of counts. Exit code 1: a promise was broken; the folder is kept, and printed with the seed.
Each trial draws only from (seed, its number). What happens at a drawn moment also depends on the machine.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # before numba and torch are imported
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(ROOT))
WORKERS = 2
ATTACKS = ("kills", "faults", "disks", "rivals", "inputs")


class Trial(NamedTuple):
    """One attack. check: called with an empty folder of its own and random draws; returns how many it counts for.

    It raises AssertionError with a sentence where a promise is broken.
    """

    name: str
    check: Callable[[Path, random.Random], int]


class Result(NamedTuple):
    """A trial's outcome. failure: "" if the promise was kept. folder: where the files of a failed trial are."""

    name: str
    count: int
    failure: str
    folder: str


def results_of(attack: str, home, share: float, seed: int) -> list[Result]:
    """Run a share of an attack. `home` is warm: every trial runs in a child of this process."""
    from tools import trust_disks, trust_faults, trust_inputs, trust_kills, trust_rivals

    folder = home.folder / attack
    if attack == "inputs":
        return trust_inputs.results(folder, share, seed)
    modules = {"kills": trust_kills, "faults": trust_faults, "disks": trust_disks, "rivals": trust_rivals}
    return list(spread(folder, modules[attack].trials(home, share), seed))


def part(items: list, share: float) -> list:
    """Take a share of them, evenly spaced, at least one."""
    number = max(1, round(len(items) * share))
    return [items[i * len(items) // number] for i in range(number)]


def spread(folder: Path, trials: list[Trial], seed: int) -> Iterator[Result]:
    """Share the trials between WORKERS processes. Returns the results in the order of the trials."""
    folder.mkdir(parents=True)
    children = []
    for worker in range(WORKERS):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setpgid(0, 0)  # with the commands that it starts
                with (folder / f"results-{worker}").open("w") as file:
                    for number in range(worker, len(trials), WORKERS):
                        file.write(json.dumps(tried(folder / str(number), trials[number], seed, number)) + "\n")
                        file.flush()
                code = 0
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        with suppress(OSError):  # parent and child both do it; the child may have ended
            os.setpgid(child, child)
        children.append(child)
    try:
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    except BaseException:  # Ctrl-C, or a signal to this process alone
        _stop(children)
        raise
    for worker, code in enumerate(codes):
        yield from (Result(*json.loads(line)) for line in (folder / f"results-{worker}").read_text().splitlines())
        if code:
            yield Result("a worker", 0, f"ended with {code}", str(folder))


def _stop(children: list[int]) -> None:
    """Stop the workers: each ends its trial and unmounts its disk. Then end every command of theirs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for child in children:
            with suppress(ProcessLookupError):
                os.killpg(child, number)
        for child in children:
            with suppress(ChildProcessError):
                os.waitpid(child, 0)


def tried(folder: Path, trial: Trial, seed: int, number: int) -> Result:
    """Run one trial. Its folder stays only after a failure."""
    folder.mkdir()
    try:
        count = trial.check(folder, random.Random(f"{seed} {number}"))
    except Exception as error:  # a bug of the attack itself, too: the other trials go on
        said = str(error) if isinstance(error, AssertionError) else traceback.format_exc()
        return Result(trial.name, 1, f"{said} (seed {seed}, trial {number})", str(folder))
    shutil.rmtree(folder)
    return Result(trial.name, count, "", "")


def table(results: dict[str, list[Result]], seconds: dict[str, float]) -> str:
    """A line for each attack and command: the number of trials and of broken promises."""
    lines = [f"{'attack':<10}{'command':<32}{'tried':>8}{'broken':>8}"]
    for attack, found in results.items():
        for name in dict.fromkeys(result.name for result in found):
            same = [result for result in found if result.name == name]
            broken = sum(bool(result.failure) for result in same)
            lines.append(f"{attack:<10}{name:<32}{sum(result.count for result in same):>8}{broken or '':>8}")
        total = sum(result.count for result in found)
        broken = sum(bool(result.failure) for result in found)
        lines.append(f"{attack:<10}{f'all, in {seconds[attack]:.0f} s':<32}{total:>8}{broken or '':>8}")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Attack every command that writes.")
    names = f"of {', '.join(ATTACKS)}; none: all"
    parser.add_argument("attacks", nargs="*", metavar="ATTACK", help=names)
    parser.add_argument("--share", type=float, default=1.0, help="of the trials (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    a = parser.parse_args(argv)
    if unknown := [name for name in a.attacks if name not in ATTACKS]:
        parser.error(f"there is no attack {unknown[0]!r}: name some of {', '.join(ATTACKS)}")
    from tools.trust_commands import Home

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    home = Home(Path(tempfile.mkdtemp(prefix="qlora-lab-trust-")))
    broken = []
    try:
        home.warm()
        results, seconds = {}, {}
        for name in a.attacks or ATTACKS:
            start = time.monotonic()
            results[name] = results_of(name, home, a.share, a.seed)
            broken += [result for result in results[name] if result.failure]
            seconds[name] = time.monotonic() - start
            print(f"{name}: {seconds[name]:.0f} s", file=sys.stderr, flush=True)
        print(table(results, seconds))
        for result in broken:
            print(f"{result.name}: {result.failure}; see {result.folder}", file=sys.stderr)
    finally:
        with suppress(ChildProcessError):  # a command that still runs would write on
            while True:
                os.waitpid(-1, 0)
        if not broken:
            shutil.rmtree(home.folder, ignore_errors=True)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
