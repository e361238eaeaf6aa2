"""Compare PagedAdamW on a GPU with torch's AdamW, bit for bit, and time steps with a part of its state in memory.

In: a device. Out: for each store and each share of the state in memory: whether three steps gave the same bits,
seconds per step, and the page events of one step. Stores: "host" is pinned host memory, "managed" is CUDA's managed
memory. If Triton interprets, the stores are "file" and "host" on the CPU, where nothing is pinned.

The bits must equal those of torch.optim.AdamW with foreach=False: PagedAdamW performs the same operations in the
same order. torch's two other variants may round differently, so their distance is only recorded.
A time is a median of consecutive steps; the clock waits for the device at both ends. Only one optimizer is in memory
at a time, and it is sized to fit into the card's free memory.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from time import perf_counter

import torch

from bench.gpu_card import synchronize
from bench.gpu_check import first_line
from bench.paging import SHARES
from bench.render import PEER
from bench.timing import in_turn
from qlora_lab.doctor.free_memory import free_memory
from qlora_lab.optim.paged_adamw import UNIT, PagedAdamW
from qlora_lab.optim.paging import PAGE_SIZE

NUMEL = 2**26  # 512 MiB of state
TOY_NUMEL = 2**12
TOY_PAGE = 4096
BYTES = 64  # of free memory per element: p, its gradient, two moments and three temporaries take 28
GRADIENTS = 1.0, -0.5, 0.25  # factors of the first gradient: powers of two, so that every contender has the same bits
MANAGED = "managed memory is CUDA's: there is no such device here"


def stores_of(device: torch.device) -> tuple[str, ...]:
    return ("host", "managed") if device.type == "cuda" else ("file", "host")


def start(numel: int, device: torch.device, make: Callable) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """Make a parameter with its gradient, from a seed, and its optimizer."""
    generator = torch.Generator(device).manual_seed(0)
    p, gradient = (torch.randn(numel, device=device, generator=generator) for _ in range(2))
    p = torch.nn.Parameter(p)
    p.grad = gradient
    return p, make([p])


def three_steps(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.Tensor:
    """What p is then, on the CPU."""
    gradient = p.grad
    for factor in GRADIENTS:
        p.grad = gradient * factor
        optimizer.step()
    p.grad = gradient
    return p.detach().cpu()


def timed(optimizer: torch.optim.Optimizer, device: torch.device, seconds: float) -> dict:
    """Seconds per step, over as many rounds as time allows, 3 to 9."""

    def step() -> None:
        optimizer.step()
        synchronize(device)

    begin = perf_counter()
    step()
    rounds = max(3, int(min(9, seconds / (perf_counter() - begin) - 3)))
    return in_turn({"step": step}, rounds, 0.0)["step"]


def contenders(numel: int, page_size: int, device: torch.device) -> dict[str, Callable]:
    """Name -> a function that makes an optimizer of parameters."""
    makers = {f"torch.optim.AdamW, {name}": partial(torch.optim.AdamW, **options) for name, options in TORCH.items()}
    for store in stores_of(device):
        for share, parts in SHARES.items():
            budget = max(page_size, UNIT[32][1] * numel // parts)
            makers[f"{store}, {share}"] = partial(PagedAdamW, page_size=page_size, budget=budget, store=store)
    makers["8 bits, all in memory"] = partial(PagedAdamW, bits=8)
    if find_spec(PEER):
        makers |= {f"{PEER} {name}": partial(_theirs, name, options) for name, options in THEIRS.items()}
    return makers


TORCH = {"one by one": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
THEIRS = {"PagedAdamW32bit": {}, "AdamW8bit": {"min_8bit_size": 1}, "PagedAdamW8bit": {"min_8bit_size": 1}}


def _theirs(name: str, options: dict, params: list) -> torch.optim.Optimizer:
    import bitsandbytes.optim

    return getattr(bitsandbytes.optim, name)(params, **options)


def measure(make: Callable, numel: int, device: torch.device, wanted: torch.Tensor, seconds: float) -> dict:
    p, optimizer = start(numel, device, make)
    result = three_steps(p, optimizer)
    facts = {"equal": torch.equal(result, wanted), "largest_difference": (result - wanted).abs().max().item()}
    facts["seconds"] = timed(optimizer, device, seconds)
    if isinstance(optimizer, PagedAdamW):
        pages = optimizer.pages
        pages.events.clear()
        optimizer.step()
        happened = dict(Counter(event.kind for event in pages.events))
        facts |= {"pages": pages.count, "frames": len(pages.frames), "events_of_a_step": happened}
    synchronize(device)
    return facts


def part(device: torch.device, quick: bool, end: float, results: dict) -> list[str]:
    """Fill `results`. Returns a sentence for each failure."""
    free = free_memory(device)
    page_size = TOY_PAGE if quick else PAGE_SIZE
    numel = TOY_NUMEL if quick else min(NUMEL, free // BYTES)
    results |= {"numel": numel, "state_bytes": UNIT[32][1] * numel, "page_size": page_size, "free_bytes": free}
    results |= {"pinned": device.type == "cuda", "optimizers": {}}
    wanted = three_steps(*start(numel, device, partial(torch.optim.AdamW, foreach=False)))
    todo = contenders(numel, page_size, device)
    failures = []
    for number, (name, make) in enumerate(todo.items()):
        try:
            share = (end - perf_counter()) / (len(todo) - number)
            measured = measure(make, numel, device, wanted, share)
        except Exception as error:  # a driver may raise anything
            measured = {"error": first_line(error)}
        results["optimizers"][name] = measured
        if name.startswith(stores_of(device)) and not measured.get("equal"):
            failures.append(
                f"{name}: " + measured.get("error", f"differs by {measured.get('largest_difference')} at most")
            )
    if "managed" not in stores_of(device):
        results["optimizers"]["managed"] = {"skipped": MANAGED}
    return failures
