"""Time paging on the CPU: steps of AdamW with all of its state in memory, and with a part of it.

    python bench/paging.py                     measure and write paging.json, two minutes
    python bench/paging.py --quick --out FILE  toy sizes: to see that it runs

Contenders run in turn in one process. A figure is the median of `rounds` steps; low and high are quartiles. "copy" is
the floor of paging a tenth: every page is read from the file once and written to it once. There are three runs: shares
of the state in memory; the same shares with and without prefetching, with all of torch's threads and with one; 8-bit
moments by the kernel, by the readable code and by bitsandbytes. Nothing here asserts a time.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.cpu import versions  # noqa: E402
from bench.files import write  # noqa: E402
from bench.timing import cpu_name, in_turn  # noqa: E402
from qlora_lab.kernels import OVERRIDE  # noqa: E402
from qlora_lab.optim.paged_adamw import UNIT, PagedAdamW  # noqa: E402
from qlora_lab.optim.paging import PAGE_SIZE  # noqa: E402

SHARES = {"all in memory": 1, "a quarter": 4, "a tenth": 10}


def optimizer(numel: int, make) -> torch.optim.Optimizer:
    p = torch.nn.Parameter(torch.randn(numel))
    p.grad = torch.randn(numel)
    return make([p])


def copy(file: int, page: bytearray, pages: int) -> None:
    """Read and write every page of a file, in order."""
    for number in range(pages):
        os.preadv(file, [page], number * len(page))
        os.pwrite(file, page, number * len(page))


def paged(numel: int, page_size: int, share: int, ahead: bool = True) -> PagedAdamW:
    budget = max(page_size, UNIT[32][1] * numel // share)
    adamw = optimizer(numel, partial(PagedAdamW, page_size=page_size, budget=budget))
    if not ahead:
        adamw.pages.prefetch = lambda number: None
    return adamw


def measure(numel: int, page_size: int, rounds: int) -> dict:
    """Seconds per step of each contender, and the page events of one step."""
    state = UNIT[32][1] * numel
    shares = {name: paged(numel, page_size, share) for name, share in SHARES.items()}
    steps = {"torch.optim.AdamW": optimizer(numel, torch.optim.AdamW).step}
    steps |= {name: adamw.step for name, adamw in shares.items()}
    with tempfile.TemporaryFile() as file:
        file.truncate(state)
        pages = max(1, state // page_size)
        seconds = in_turn(steps | {"copy": partial(copy, file.fileno(), bytearray(page_size), pages)}, rounds, 0.0)
    events = {}
    for name, adamw in shares.items():
        adamw.pages.events.clear()
        adamw.step()
        events[name] = dict(Counter(event.kind for event in adamw.pages.events))
    return {"state_bytes": state, "page_size": page_size, "seconds": seconds, "events_of_a_step": events}


def prefetched(numel: int, page_size: int, rounds: int) -> dict[str, dict]:
    """torch's threads -> seconds per step, for each share with and without prefetching the next page."""
    whole, *shares = SHARES.items()
    steps = {whole[0]: paged(numel, page_size, whole[1]).step}
    for name, share in shares:
        steps[name] = paged(numel, page_size, share).step
        steps[f"{name}, no prefetch"] = paged(numel, page_size, share, ahead=False).step
    seconds = {}
    threads = torch.get_num_threads()
    try:
        for n in sorted({threads, 1}, reverse=True):
            torch.set_num_threads(n)
            seconds[str(n)] = in_turn(steps, rounds, 0.0)
    finally:
        torch.set_num_threads(threads)
    return seconds


def eight_bits(numel: int, rounds: int) -> dict:
    """Seconds per step over `numel` parameters with 8-bit moments, all in memory, beside 32 bits."""
    kernel, readable = (optimizer(numel, partial(PagedAdamW, bits=8)) for _ in range(2))
    steps = {
        "32 bits": optimizer(numel, PagedAdamW).step,
        "8 bits": kernel.step,
        "8 bits, readable code": partial(by_reference, readable.step),
    }
    if find_spec("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit

        steps["bitsandbytes AdamW8bit"] = optimizer(numel, partial(AdamW8bit, min_8bit_size=1)).step
    return {"numel": numel, "seconds": in_turn(steps, rounds, 0.0)}


def by_reference(step) -> None:
    os.environ[OVERRIDE] = "reference"
    try:
        step()
    finally:
        del os.environ[OVERRIDE]


def table(result: dict) -> str:
    lines = [f"{result['processor']}; state {result['state_bytes'] / 2**20:.0f} MiB, {result['date']}"]
    lines += rows(result["seconds"], "torch.optim.AdamW", result["events_of_a_step"])
    for threads, seconds in result["prefetch"].items():
        lines += ["", f"the next page prefetched, or not; threads of torch: {threads}", *rows(seconds, "all in memory")]
    of = result["eight_bits"]
    return "\n".join([*lines, "", f"8 bits, {of['numel']:,} parameters", *rows(of["seconds"], "32 bits")])


def rows(seconds: dict[str, dict], base: str, events: dict[str, dict] | None = None) -> list[str]:
    lines = []
    for name, times in seconds.items():
        spread = f"({times['low'] * 1e3:.1f} to {times['high'] * 1e3:.1f})"
        happened = ", ".join(f"{n} {kind}" for kind, n in (events or {}).get(name, {}).items())
        ratio = times["median"] / seconds[base]["median"]
        lines.append(f"{name:23} {times['median'] * 1e3:8.1f} ms {spread:20} x {ratio:.2f}  {happened}".rstrip())
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, two rounds")
    parser.add_argument("--out", type=Path, default=HERE / "paging.json", help="JSON file (default: bench/paging.json)")
    args = parser.parse_args()
    if args.quick and args.out == HERE / "paging.json":
        parser.error("--quick measures nothing worth keeping: give --out FILE")
    sizes = (2**12, 4096, 2) if args.quick else (2**24, PAGE_SIZE, 9)
    measured = measure(*sizes) | {
        "prefetch": prefetched(*sizes),
        "eight_bits": eight_bits(*((2**12, 2) if args.quick else (2**22, 9))),
    }
    facts = {"date": datetime.date.today().isoformat(), "processor": cpu_name(), "versions": versions()}
    result = facts | {"threads": torch.get_num_threads()} | measured
    write(args.out, json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
