"""Run one part of a device day, which tests this library on a GPU in a few minutes. bench/gpu_day.sh runs all parts.

    python bench/gpu_day.py PART                      writes gpu-day-<device>-PART.json here
    python bench/gpu_day.py PART --quick --out DIR    toy sizes: to see that it runs, also with TRITON_INTERPRET=1

Parts: check, every rung against its readable twin; kernels, their times and the card's limits; steps, 20 QLoRA steps
compared with a CPU's; seven_b, a 7B model; paging, PagedAdamW. --seconds limits the time of the part; it measures
fewer rounds if time is short.

A part that fails or is stopped writes its results so far, and says why. Exit code 1: it failed. 2: there is no GPU, or
the folder cannot be written. 130: Ctrl-C. Nothing here asserts a time.
"""

import argparse
import json
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial
from math import inf, isfinite
from pathlib import Path
from time import perf_counter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from bench.files import write  # noqa: E402
from bench.gpu_card import machine, refusal, rungs_on, slug, synchronize, the_device  # noqa: E402
from bench.gpu_check import Differs, checks, first_line  # noqa: E402

INTERRUPTED = "interrupted by Ctrl-C"
Part = Callable[[torch.device, bool, float, dict], list[str]]  # device, quick, end, results -> what failed


def check(device: torch.device, quick: bool, end: float, results: dict) -> list[str]:
    """Check every rung against its twin. A difference is printed, and the other checks go on."""
    differences: list[str] = []
    results |= {"checks": 0, "cut": False, "differences": differences}
    for comparison in checks(device, quick):
        if perf_counter() > end:
            results["cut"] = True
            break
        results["checks"] += 1
        try:
            comparison()
        except Differs as difference:
            print(difference, file=sys.stderr, flush=True)
            differences.append(str(difference))
            synchronize(device)  # if the device itself is lost, so are the remaining checks
    return differences


def kernels(device: torch.device, quick: bool, end: float, results: dict) -> list[str]:
    """Time each kernel beside a copy, a matrix product, the readable functions, and bitsandbytes."""
    from bench.gpu import measure_into, table

    measure_into(results, device, quick, end - perf_counter())
    print(table(machine(device) | results))
    ours = [(row["work"], row["shape"], row["seconds"]["ours"]) for row in results["rows"]]
    return [f"{work} {shape}: {times['error']}" for work, shape, times in ours if "error" in times]


def steps(*arguments) -> list[str]:
    from bench.gpu_steps import part

    return part(*arguments)


def seven_b(*arguments) -> list[str]:
    from bench.gpu_seven_b import part

    return part(*arguments)


def paging(*arguments) -> list[str]:
    from bench.gpu_paging import part

    return part(*arguments)


PARTS: dict[str, Part] = {function.__name__: function for function in (check, kernels, steps, seven_b, paging)}


def run(name: str, quick: bool, seconds: float, folder: Path) -> list[str]:
    """Make a part, write its file, and return what failed."""
    begin = perf_counter()
    device = the_device()
    results = {}
    facts = machine(device)  # asked now, because a device that is lost later cannot say its name
    before = signal.signal(signal.SIGTERM, partial(_stop, name))
    try:
        with rungs_on(device):
            failures = PARTS[name](device, quick, begin + seconds, results)
    except KeyboardInterrupt:
        failures = [*results.get("differences", ()), INTERRUPTED]
    except (Exception, SystemExit) as error:  # a device or a library may raise anything
        traceback.print_exc()
        failures = [*results.get("differences", ()), first_line(error)]
    finally:
        signal.signal(signal.SIGTERM, before)
    facts |= {"part": name, "quick": quick, "ok": not failures, "failures": failures}
    facts |= {"seconds": perf_counter() - begin, "limit": seconds if isfinite(seconds) else None}
    text = json.dumps(facts | results, indent=1) + "\n"
    write(folder / f"gpu-day-{slug(facts['device'])}-{name}.json", text)
    return failures


def _stop(name: str, *_: object) -> None:
    sys.exit(f"{name} was stopped: its time was up")


def _interrupt(*_: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all, and `timeout` once more
    raise KeyboardInterrupt


def ready(folder: Path) -> None:
    """Make the folder and check that it can be written, before the device works. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="toy sizes")
    parser.add_argument("--out", type=Path, help="folder of the JSON file (default: bench)")
    parser.add_argument("--seconds", type=float, default=inf, help="time limit of the part")
    args = parser.parse_args()
    if why := refusal():
        print(why, file=sys.stderr)
        sys.exit(2)
    if (args.quick or the_device().type == "cpu") and not (args.quick and args.out):
        parser.error("toy sizes measure nothing worth keeping, and the interpreter nothing else: --quick --out DIR")
    folder = args.out or HERE
    try:
        ready(folder)
    except OSError as error:
        parser.exit(2, f"no file can be written into {folder} ({error.strerror}): --out takes another folder\n")
    signal.signal(signal.SIGINT, _interrupt)
    failures = run(args.part, args.quick, args.seconds, folder)
    for failure in failures:
        print(f"{args.part}: {failure}", file=sys.stderr)
    sys.exit(130 if INTERRUPTED in failures else 1 if failures else 0)


if __name__ == "__main__":
    main()
