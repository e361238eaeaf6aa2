"""A trial of `make trust`, its result, and the processes that share the trials."""

import json
import os
import random
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

WORKERS = 2


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
            except Exception:  # of the attack itself: the exit code reports it
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
