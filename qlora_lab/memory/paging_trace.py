"""Which pages a step asks for, which of them fault, what leaves when a batch is long: counted, without a GPU.

    sizes of a LLaMA, rank r, bits -> elements, bytes and pages of its adapter's AdamW state
    pages in the order they are asked for, frames -> each access, and the page table at the end
    bytes of activations, step by step -> pages of state that leave the device and come back

Source: QLoRA section 3, "Paged Optimizers"; the rule of peers is get_state_buffer in bitsandbytes' optim/optimizer.py,
0.50.2; bandwidth is that of the PCI Express Base Specification. The device of `timeline` is a model: it has a capacity
and nothing else. Its pages are moved by the library's own Pages.

Not here: pages that hold bytes (optim/paging.py), the optimizer (optim/paged_adamw.py).
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from qlora_lab.memory.shape import Shape, shape_of
from qlora_lab.optim.paged_adamw import UNIT
from qlora_lab.optim.paging import PAGE_SIZE, Pages

PEERS_LEAST = 100_000  # elements that a tensor needs in bitsandbytes, or its moments stay where the GPU is
PCIE = {3: 8e9, 4: 16e9, 5: 32e9}  # generation: bits a second on one lane, each way
PCIE_CODING = 128 / 130  # bits that are data


LLAMA_7B = shape_of("llama-7b")
SMOLLM2_135M = Shape("smollm2-135m", "llama", 30, 576, 1536, 9, 3, 64, 49152, tied=True)


def adapter(model: Shape, r: int) -> list[int]:
    """Elements of lora_A and lora_B of all linear layers, in the order of the model's parameters."""
    return [size for one in model.linears for size in (r * one.in_features, one.out_features * r)] * model.layers


def pageable_share(numels: Sequence[int], least: int = PEERS_LEAST) -> float:
    """Share of all elements that lie in tensors of at least `least`: what peers' paged optimizers can page.

    >>> pageable_share([100_000, 300_000, 99_999, 1])
    0.8
    """
    return sum(n for n in numels if n >= least) / sum(numels)


def state_bytes(numels: Iterable[int], bits: int) -> int:
    """Bytes of both moments of these parameters, as PagedAdamW lays them out; bits: 32 or 8.

    >>> state_bytes([256], 32), state_bytes([256], 8)
    (2048, 520)
    """
    together, nbytes = UNIT[bits]
    return sum(-(-n // together) for n in numels) * nbytes


def state_pages(numels: Iterable[int], bits: int, page_size: int = PAGE_SIZE) -> int:
    """Pages that PagedAdamW has for these parameters. A page holds whole elements or blocks, and may keep a rest."""
    nbytes = UNIT[bits][1]
    return -(-state_bytes(numels, bits) // (page_size // nbytes * nbytes))


class Access(NamedTuple):
    """A page was asked for: the frame it is in, whether it had to be fetched, and which page left for it."""

    page: int
    frame: int
    fault: bool
    evicted: int | None


def replay(asked: Iterable[int], frames: int) -> tuple[list[Access], dict[int, int]]:
    """Pages asked for, in order -> each access, and the table at the end: page -> frame, least recently used first.

    The least recently used page leaves, as in Pages, but nothing is fetched ahead and no byte is moved.

    >>> accesses, table = replay([0, 1, 0, 2], frames=2)
    >>> accesses[-1], table
    (Access(page=2, frame=1, fault=True, evicted=1), {0: 0, 2: 1})
    """
    accesses, table = [], OrderedDict()
    for page in asked:
        fault, evicted = page not in table, None
        if fault and len(table) == frames:
            evicted, frame = table.popitem(last=False)
        elif fault:
            frame = len(table)  # frames are taken in order while there are free ones
        else:
            frame = table[page]
        table[page] = frame
        table.move_to_end(page)
        accesses.append(Access(page, frame, fault, evicted))
    return accesses, dict(table)


def faults_of_a_step(order: Sequence[int], frames: int) -> int:
    """Faults of every step after the first, if each step asks for pages in this order.

    >>> faults_of_a_step(range(10), frames=10), faults_of_a_step(range(10), frames=9)
    (0, 10)
    """
    accesses, _ = replay([*order, *order], frames)
    return sum(access.fault for access in accesses[len(order) :])


def pcie_bandwidth(generation: int, lanes: int = 16) -> float:
    """Bytes a second, each way, that the specification allows: no transfer reaches it. ValueError if not in PCIE."""
    if generation not in PCIE:
        raise ValueError(f"generation={generation} is not known: it is one of {', '.join(map(str, PCIE))}")
    return PCIE[generation] * lanes * PCIE_CODING / 8


def fixed_bytes(model: Shape, r: int, bits_per_weight: float) -> int:
    """What stays on a device while an adapter of rank r is trained, all but the optimizer's state.

    Linear layers at `bits_per_weight`, embeddings and head in bf16, adapters and their gradients in float32. Norms, a
    hundredth of a percent, are left out, and so is what drivers and libraries take for themselves.
    """
    weights = model.layers * sum(one.numel for one in model.linears)
    tables = (2 - model.tied) * model.table
    return round(weights * bits_per_weight / 8) + 2 * tables + 8 * sum(adapter(model, r))


def activation_bytes(model: Shape, tokens: int) -> int:
    """The most that activations need at once in a step with gradient checkpointing, in bf16, for this many tokens.

    The input of each layer is kept. On top comes either the head: logits and their gradient, float32; or, later, one
    layer that is computed again: 5 vectors of `hidden` (two norms, q, attention, residual), k and v, and 4 of `inner`
    (gate, up, silu, product). Attention is counted without its scores, which a fused kernel never stores.
    """
    kept = 2 * model.layers * model.hidden
    layer = 2 * (5 * model.hidden + 2 * model.key_value + 4 * model.inner)
    return tokens * (kept + max(8 * model.vocabulary, layer))


class Moment(NamedTuple):
    """A training step on the model device: bytes of activations; pages of state that stayed beside them, that left for
    them, and that were fetched for the optimizer."""

    activations: int
    stayed: int
    left: int
    fetched: int


def timeline(activations: Sequence[int], state: int, room: int, page_size: int = PAGE_SIZE) -> list[Moment]:
    """Step by step, a device with `room` bytes for state and activations; state and activations in bytes.

    Backward, activations take the frames they need, and pages of state leave. Then activations are freed, and the
    optimizer asks for each page of state. The Pages are real, but a page holds eight bytes here: its own count of
    steps, which must be right at the end.
    Raises ValueError where activations alone do not fit: there paging does not help.
    """
    if max(activations) > room:
        raise ValueError(f"activations of {max(activations)} bytes do not fit in {room}: pages of state are all gone")
    count, frames = -(-state // page_size), room // page_size
    needs = [-(-nbytes // page_size) for nbytes in activations]
    pages = Pages(8 * (count + max(needs)), 8, 8 * frames)
    _step(pages, count)
    moments = [_moment(pages, count, *one) for one in zip(activations, needs, strict=True)]
    counted = {int(pages.page(number).view(torch.int64)) for number in range(count)}
    assert counted == {1 + len(activations)}, f"pages have counted {counted} steps, there were {1 + len(activations)}"
    return moments


def _step(pages: Pages, count: int) -> None:
    for number in range(count):
        pages.page(number).view(torch.int64).add_(1)


def _moment(pages: Pages, count: int, nbytes: int, need: int) -> Moment:
    before = _state(pages, count)
    for number in range(count, count + need):
        pages.page(number)
    stayed = _state(pages, count)
    # Pages cannot free. But what is asked for before something else leaves after it: activations are now the first.
    for number in stayed:
        pages.page(number)
    pages.events.clear()
    _step(pages, count)
    fetched = sum(e.kind in ("fault", "prefetch") and e.page < count for e in pages.events)
    return Moment(nbytes, len(stayed), len(set(before) - set(stayed)), fetched)


def _state(pages: Pages, count: int) -> list[int]:
    return [number for number in pages.resident if number < count]
