"""Attack every command that writes, and count: `make trust`. docs/trust.md explains each count.

    python tools/trust.py                                   everything, in less than 15 minutes on two cores
    python tools/trust.py kills disks --share 0.1 --seed 3  a tenth of two attacks, with other draws

It prints a table of counts. Exit code 1: a promise was broken; the folder is kept, and printed with the seed.
Each trial draws only from (seed, its number). What happens at a drawn moment also depends on the machine.
"""

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # before numba and torch are imported
    os.environ |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(ROOT))

from tools.trust_trials import Result, spread  # noqa: E402 - a script starts beside its folder

ATTACKS = ("kills", "faults", "disks", "rivals", "inputs")


def results_of(attack: str, home, share: float, seed: int) -> list[Result]:
    """Run a share of an attack. `home` is warm: every trial runs in a child of this process."""
    from tools import trust_disks, trust_faults, trust_inputs, trust_kills, trust_rivals

    folder = home.folder / attack
    if attack == "inputs":
        return trust_inputs.results(folder, share, seed)
    modules = {"kills": trust_kills, "faults": trust_faults, "disks": trust_disks, "rivals": trust_rivals}
    return list(spread(folder, modules[attack].trials(home, share), seed))


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
