"""What paging costs on the CPU: a step of AdamW with all of its state in memory, and with a part of it.

    python bench/paging.py                     measure and write paging.json, a minute
    python bench/paging.py --quick --out FILE  toy sizes: to see that it runs

Contenders run in turn in one process; a figure is the median of `rounds` steps, low and high are quartiles. "copy" is
the floor of paging a tenth: every page is read from the file once and written to it once. Nothing here asserts a time.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench.cpu import versions  # noqa: E402
from bench.files import write  # noqa: E402
from bench.timing import cpu_name, in_turn  # noqa: E402
from qlora_lab.finetune.paged_adamw import UNIT, PagedAdamW  # noqa: E402
from qlora_lab.finetune.paging import PAGE_SIZE  # noqa: E402

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


def measure(numel: int, page_size: int, rounds: int) -> dict:
    """seconds of a step for each contender, and what happened to pages in one step."""
    state = UNIT[32][1] * numel
    paged = {
        name: optimizer(numel, partial(PagedAdamW, page_size=page_size, budget=max(page_size, state // share)))
        for name, share in SHARES.items()
    }
    steps = {"torch.optim.AdamW": optimizer(numel, torch.optim.AdamW).step}
    steps |= {name: one.step for name, one in paged.items()}
    with tempfile.TemporaryFile() as file:
        file.truncate(state)
        pages = max(1, state // page_size)
        seconds = in_turn(steps | {"copy": partial(copy, file.fileno(), bytearray(page_size), pages)}, rounds, 0.0)
    events = {}
    for name, one in paged.items():
        one.pages.events.clear()
        one.step()
        events[name] = dict(Counter(event.kind for event in one.pages.events))
    return {"state_bytes": state, "page_size": page_size, "seconds": seconds, "events_of_a_step": events}


def table(result: dict) -> str:
    base = result["seconds"]["torch.optim.AdamW"]["median"]
    lines = [f"{result['processor']}; state {result['state_bytes'] / 2**20:.0f} MiB, {result['date']}"]
    for name, one in result["seconds"].items():
        spread = f"({one['low'] * 1e3:.1f} to {one['high'] * 1e3:.1f})"
        events = ", ".join(f"{n} {kind}" for kind, n in result["events_of_a_step"].get(name, {}).items())
        lines.append(
            f"{name:18} {one['median'] * 1e3:8.1f} ms {spread:18} x {one['median'] / base:.2f}  {events}".rstrip()
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes, two rounds")
    parser.add_argument("--out", type=Path, default=HERE / "paging.json", help="JSON file (default: bench/paging.json)")
    args = parser.parse_args()
    if args.quick and args.out == HERE / "paging.json":
        parser.error("--quick measures nothing worth keeping: give --out FILE")
    measured = measure(2**12, 4096, 2) if args.quick else measure(2**24, PAGE_SIZE, 9)
    facts = {"date": datetime.date.today().isoformat(), "processor": cpu_name(), "versions": versions()}
    result = facts | {"threads": torch.get_num_threads()} | measured
    write(args.out, json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
