"""Count, without a GPU, the pages that a step asks for, the faults, and the pages that leave when a batch is long.

    sizes of a LLaMA, rank r, bits -> elements, bytes and pages of its adapter's AdamW state
    pages in the order of the requests, frames -> each access, and the page table at the end
    bytes of activations, step by step -> pages of state that leave the device and come back

Source: QLoRA section 3, "Paged Optimizers"; bitsandbytes' rule is get_state_buffer in its optim/optimizer.py, 0.50.2;
bandwidth comes from the PCI Express Base Specification. The device of `timeline` is a model that has a capacity and
nothing else. The library's own Pages move its pages.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from qlora_lab.memory.shape import Shape, shape_of
from qlora_lab.optim.paged_adamw import UNIT
from qlora_lab.optim.paging import PAGE_SIZE, Pages

PEERS_LEAST = 100_000  # elements: bitsandbytes keeps the moments of a smaller tensor on the GPU
PCIE = {3: 8e9, 4: 16e9, 5: 32e9}  # generation: bits per second on one lane, each way
PCIE_CODING = 128 / 130  # share of the bits that carry data

LLAMA_7B = shape_of("llama-7b")
SMOLLM2_135M = Shape("smollm2-135m", "llama", 30, 576, 1536, 9, 3, 64, 49152, tied=True)


def adapter(model: Shape, r: int) -> list[int]:
    """List the elements of lora_A and lora_B of all linear layers, in the order of the model's parameters.

    Raises ValueError for a mixture of experts, most of whose weights are in no linear layer.
    """
    if model.experts:
        raise ValueError(f"{model.name} is a mixture of experts, which predict_memory counts: give a dense model")
    layer = [numel for linear in model.linears for numel in (r * linear.in_features, linear.out_features * r)]
    return layer * model.layers


def pageable_share(numels: Sequence[int], least: int = PEERS_LEAST) -> float:
    """Return the share of elements in tensors of at least `least` elements, the ones that bitsandbytes can page."""
    return sum(n for n in numels if n >= least) / sum(numels)


def state_bytes(numels: Iterable[int], bits: int) -> int:
    """Count the bytes of both moments of these parameters in PagedAdamW's layout. bits: 32 or 8."""
    together, nbytes = UNIT[bits]  # elements of a unit, and bytes of both their moments
    return sum(-(-n // together) for n in numels) * nbytes


def state_pages(numels: Iterable[int], bits: int, page_size: int = PAGE_SIZE) -> int:
    """Count PagedAdamW's pages for these parameters. A page holds whole elements or blocks; its rest stays unused."""
    nbytes = UNIT[bits][1]
    return -(-state_bytes(numels, bits) // (page_size // nbytes * nbytes))


class Access(NamedTuple):
    """One request for a page."""

    page: int
    frame: int  # that holds the page now
    fault: bool  # the page had to be fetched
    evicted: int | None  # the page that left to make room


def replay(asked: Iterable[int], frames: int) -> tuple[list[Access], dict[int, int]]:
    """Return each access, and the page table at the end: page -> frame, least recently used first.

    asked: pages, in the order of the requests. The least recently used page leaves, as in Pages, but nothing is fetched
    ahead and no byte moves.

    >>> accesses, table = replay([0, 1, 0, 2], frames=2)
    >>> accesses[-1], table
    (Access(page=2, frame=1, fault=True, evicted=1), {0: 0, 2: 1})
    """
    accesses = []
    table: OrderedDict[int, int] = OrderedDict()  # page -> frame
    for page in asked:
        fault = page not in table
        evicted = None
        if fault and len(table) == frames:
            evicted, frame = table.popitem(last=False)  # the least recently used page stands first
        elif fault:
            frame = len(table)  # the next free one
        else:
            frame = table[page]
        table[page] = frame
        table.move_to_end(page)  # now the most recently used
        accesses.append(Access(page, frame, fault, evicted))
    return accesses, dict(table)


def faults_of_a_step(order: Sequence[int], frames: int) -> int:
    """Count the faults of every step after the first, if each step asks for pages in this order."""
    accesses, _ = replay([*order, *order], frames)
    return sum(access.fault for access in accesses[len(order) :])


def pcie_bandwidth(generation: int, lanes: int = 16) -> float:
    """Return the specified bytes per second, each way; no transfer reaches them. Raises ValueError if not in PCIE."""
    if generation not in PCIE:
        raise ValueError(f"generation={generation} is not known: choose from {', '.join(map(str, PCIE))}")
    return PCIE[generation] * lanes * PCIE_CODING / 8  # 8 bits in a byte


def fixed_bytes(model: Shape, r: int, bits_per_weight: float) -> int:
    """Count the bytes that stay on a device while an adapter of rank r is trained, without the optimizer's state.

    Linear layers have `bits_per_weight`, embeddings and head are bf16, adapters and their gradients float32. Norms, a
    hundredth of a percent, are left out, and so is the memory of drivers and libraries.
    """
    weights = model.layers * sum(linear.numel for linear in model.linears)
    tables = (2 - model.tied) * model.table
    return round(weights * bits_per_weight / 8) + 2 * tables + 8 * sum(adapter(model, r))


def activation_bytes(model: Shape, tokens: int) -> int:
    """Return the peak of the activations in a step with gradient checkpointing, in bf16, for this many tokens.

    Each layer keeps its input. On top comes either the head, with logits and their gradient in float32, or, later, one
    layer that is computed again: 5 vectors of `hidden` (two norms, q, attention, residual), k and v, and 4 of `inner`
    (gate, up, silu, product). Attention counts without its scores, which a fused kernel never stores.
    """
    kept = 2 * model.layers * model.hidden  # bytes per token, 2 for bf16
    layer = 2 * (5 * model.hidden + 2 * model.key_value + 4 * model.inner)
    return tokens * (kept + max(8 * model.vocabulary, layer))


class Moment(NamedTuple):
    """One training step on the model device."""

    activations: int  # bytes
    stayed: int  # pages of state that stayed beside the activations
    left: int  # pages of state that made room for them
    fetched: int  # pages of state that came back for the optimizer


def timeline(activations: Sequence[int], state: int, room: int, page_size: int = PAGE_SIZE) -> list[Moment]:
    """Simulate, step by step, a device with `room` bytes for `state` and `activations`, both in bytes.

    In the backward pass activations take the frames they need, and pages of state leave. Then the activations are
    freed, and the optimizer asks for each page of state. The Pages are real, but a page holds only eight bytes here:
    its own count of steps, which must be right at the end.
    Raises ValueError if the activations alone do not fit: paging the state cannot help then.
    """
    if max(activations) > room:
        raise ValueError(f"activations of {max(activations)} bytes do not fit in {room}: use shorter or fewer rows")
    count = -(-state // page_size)  # pages of state
    frames = room // page_size
    needs = [-(-nbytes // page_size) for nbytes in activations]  # frames for the activations of each step
    pages = Pages(8 * (count + max(needs)), 8, 8 * frames)
    _step(pages, count)
    moments = [_moment(pages, count, nbytes, need) for nbytes, need in zip(activations, needs, strict=True)]
    counted = {int(pages.page(number).view(torch.int64)) for number in range(count)}
    assert counted == {1 + len(activations)}, f"pages have counted {counted} steps, there were {1 + len(activations)}"
    return moments


def _step(pages: Pages, count: int) -> None:
    """Let the optimizer change each page of state once, in order."""
    for number in range(count):
        pages.page(number).view(torch.int64).add_(1)


def _moment(pages: Pages, count: int, nbytes: int, need: int) -> Moment:
    before = _state(pages, count)
    for number in range(count, count + need):
        pages.page(number)
    stayed = _state(pages, count)
    # Pages cannot free a page. Asking again for the state makes the activations the oldest: they leave first.
    for number in stayed:
        pages.page(number)
    pages.events.clear()
    _step(pages, count)
    fetched = sum(e.kind in ("fault", "prefetch") and e.page < count for e in pages.events)
    return Moment(nbytes, len(stayed), len(set(before) - set(stayed)), fetched)


def _state(pages: Pages, count: int) -> list[int]:
    return [number for number in pages.resident if number < count]
