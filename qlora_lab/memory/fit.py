"""Choose settings that fit a run on a card, and say what each memory switch saves.

    fit("llama-7b", 24, r=64, length=2048) -> MemoryFit

In: a model, the card's memory, and the wanted run, as fields of Setup. Out: a MemoryFit. Three switches leave the
results of the computation unchanged. They are turned on in the order of their price until the run fits:

    micro-batches            split each step into parts: the same step, a little slower
    gradient checkpointing   one more forward pass per step: a third more arithmetic
    paged optimizer          state without room leaves the card and comes back in every step

8-bit moments are compared but never chosen: they change the numbers, and 32-bit moments in pages need even less memory.
Packing is compared if mean_length gives the examples' length; how well they fill rows depends on the data.
Not here: bytes (predict.py). On a CPU the card is the machine's memory.
"""

import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from qlora_lab.memory.ledger import Ledger
from qlora_lab.memory.predict import ledger_of
from qlora_lab.memory.setup import LOW_RANK, Setup
from qlora_lab.memory.shape import Shape, shape_of
from qlora_lab.memory.targets import targeted
from qlora_lab.optim.paging import PAGE_SIZE
from qlora_lab.quant.numbers import check_number

GIB = 2**30
MOST_TOKENS = 2**20  # the search for the longest row stops here
MOST_ROWS = 2**12  # and that for the most rows
ORDER = ("micro-batches", "gradient checkpointing", "paged optimizer")  # the cheapest first
EIGHT = "8-bit moments"  # compared, never chosen
PACKING = "packing"  # compared, never chosen


@dataclass(frozen=True)
class Switch:
    """The run that was asked for, with one memory switch turned on."""

    name: str
    peak: int  # bytes
    saves: int  # bytes of the peak
    longest: int  # tokens in a single row that fits


@dataclass(frozen=True)
class MemoryFit:
    """A run that fits a card, or the smallest one if none fits. A limit is 0 if not even 1 fits."""

    nbytes: int  # of the card
    fits: bool
    asked: Ledger  # of the run that was asked for
    chosen: Ledger  # of the run that is advised
    settings: dict[str, Any]  # arguments of finetune
    switched: tuple[str, ...]  # the switches that the advised run turns on
    switches: tuple[Switch, ...]  # each switch alone, if it saves anything
    longest: int  # most tokens in a single row, with the chosen switches
    rows: int  # most rows of the asked length at once, with the chosen switches
    rank: int  # largest rank for the asked rows, with the chosen switches

    @property
    def free(self) -> int:
        """Bytes of the card that the chosen setup leaves free; negative if it does not fit."""
        return self.nbytes - self.chosen.peak

    def to_dict(self) -> dict:
        """Return every field, as plain values for JSON."""
        switches = [asdict(switch) for switch in self.switches]
        limits = {"longest": self.longest, "rows": self.rows, "rank": self.rank}
        figures = {"card": self.nbytes, "fits": self.fits, "free": self.free, "switched": list(self.switched)}
        ledgers = {"asked": self.asked.to_dict(), "chosen": self.chosen.to_dict()}
        return figures | {"settings": self.settings, "limits": limits, "switches": switches} | ledgers

    def __str__(self) -> str:
        card = f"a card of {self.nbytes / GIB:g} GiB"
        verdict = f"fits on {card}, {self.free / GIB:.2f} GiB to spare" if self.fits else self._shortage(card)
        changes = f"with {', '.join(self.switched)}" if self.switched else "as it is"
        lines = [_wrapped("asked for", str(self.asked.setup)), _wrapped("", _gib(self.asked.peak))]
        lines += [_wrapped("advised", str(self.chosen.setup))]
        lines += [_wrapped("", f"{changes}: {_gib(self.chosen.peak)}, {verdict}")]
        lines.append(f'           at its peak, in the phase "{self.chosen.phase}":')
        at_once = self.chosen.groups_at(self.chosen.phase)
        lines += [f"           {name:<12}{_gib(size):>11}" for name, size in at_once.items() if size]
        limits = f"{self.longest:,} tokens in a row of its own, {self.rows:,} rows of the length asked for"
        lines.append(f"at most    {limits}" + f", rank {self.rank:,}" * (self.rank > 0))
        for s in self.switches:
            saves = f"{_gib(s.peak):>11}, saves {_gib(s.saves)}; a row of {s.longest:,} tokens"
            lines.append(f"alone      {s.name:<24}{saves}")
        return "\n".join(lines)

    def _shortage(self, card: str) -> str:
        return f"does not fit on {card}: {-self.free / GIB:.2f} GiB are missing"


def _wrapped(head: str, text: str) -> str:
    # a notebook's page breaks longer lines inside words
    return textwrap.fill(text, 88, initial_indent=f"{head:<11}", subsequent_indent=" " * 11, break_on_hyphens=False)


def fit(model: Any, gpu_gb: float, method: str = "qlora", **setup: Any) -> MemoryFit:
    """Choose settings for `model` on a card of `gpu_gb` GiB, which sellers call GB.

    model: see shape_of. setup: fields of Setup. The result's `settings` are arguments of finetune.
    Raises ValueError for a card without memory, and whatever predict_memory raises.

    >>> fit("llama-7b", 12, r=64, length=512).fits, fit("llama-65b", 24).fits
    (True, False)
    """
    what = "the memory of a card, above 0 GB and at most 1,000,000, such as 24"
    check_number("gpu_gb", gpu_gb, lambda size: 0 < size <= 1e6, what)
    shape = shape_of(model)
    wanted = Setup(method=method, **setup)
    nbytes = int(gpu_gb * GIB)
    asked = ledger_of(shape, wanted)
    advised = wanted
    switched = []
    for name in _possible(ORDER, wanted):
        before = _peak(shape, advised)
        if before <= nbytes:
            break
        changed = _switch(name, shape, advised, nbytes)
        if _peak(shape, changed) < before:  # micro-batches of 16-bit weights, whose gradients are summed, can cost more
            advised = changed
            switched.append(name)
    chosen = ledger_of(shape, advised)
    compared = _possible((*ORDER, EIGHT, *(PACKING,) * (wanted.mean_length is not None)), wanted)
    alone = [_alone(name, shape, wanted, nbytes, asked.peak) for name in compared]
    return MemoryFit(
        nbytes=nbytes,
        fits=chosen.peak <= nbytes,
        asked=asked,
        chosen=chosen,
        settings=_settings(advised),
        switched=tuple(switched),
        switches=tuple(switch for switch in alone if switch.saves > 0),
        longest=_longest(shape, advised, nbytes),
        rows=_most(MOST_ROWS, lambda n: _peak(shape, _rows(advised, n)) <= nbytes),
        rank=_largest_rank(shape, advised, nbytes),
    )


def _possible(switches: tuple[str, ...], setup: Setup) -> list[str]:
    """Return the switches that the method allows."""
    refused = {"prefix": ("gradient checkpointing", PACKING), "prompt": (PACKING,)}.get(setup.method, ())
    return [name for name in switches if name not in refused]


def _peak(shape: Shape, setup: Setup) -> int:
    return ledger_of(shape, setup).peak


def _switch(name: str, shape: Shape, setup: Setup, nbytes: int) -> Setup:
    """Turn one more switch on. A micro-batch has as many rows as fit, at least one."""
    if name == "micro-batches" and _peak(shape, setup) <= nbytes:  # all rows, whose gradients need no sums
        return replace(setup, micro_batch_size=setup.rows)
    if name == "micro-batches":
        fitting = _most(setup.rows, lambda n: _peak(shape, replace(setup, micro_batch_size=n)) <= nbytes)
        return replace(setup, micro_batch_size=fitting or 1)
    if name == "gradient checkpointing":
        smaller = replace(setup, gradient_checkpointing=True)
        if setup.micro_batch_size is None:
            return smaller
        # checkpointing has made room: larger micro-batches may fit now
        return _switch("micro-batches", shape, replace(smaller, micro_batch_size=None), nbytes)
    pages = int(ledger_of(shape, replace(setup, paged=True)).row("moments").predicted // PAGE_SIZE)
    # keep as many pages as there is room for: every step fetches each evicted page again
    frames = _most(pages - 1, lambda n: _peak(shape, replace(setup, optimizer_budget=n * PAGE_SIZE)) <= nbytes)
    return replace(setup, optimizer_budget=(frames or 1) * PAGE_SIZE)


def _alone(name: str, shape: Shape, wanted: Setup, nbytes: int, peak: int) -> Switch:
    """Turn one switch on as far as it goes: one row at once, one page in memory."""
    changes = {
        "micro-batches": {"micro_batch_size": 1},
        "gradient checkpointing": {"gradient_checkpointing": True},
        "paged optimizer": {"optimizer_budget": PAGE_SIZE},
        EIGHT: {"optimizer_bits": 8},
        PACKING: {"packing": True},
    }
    setup = replace(wanted, **changes[name])
    less = _peak(shape, setup)
    return Switch(name, less, peak - less, _longest(shape, setup, nbytes))


def _rows(setup: Setup, rows: int) -> Setup:
    return replace(setup, batch_size=rows, micro_batch_size=None, packing=False, mean_length=None)


def _longest(shape: Shape, setup: Setup, nbytes: int) -> int:
    single = _rows(setup, 1)
    # shorter rows have no room for their pictures: they fit if the shortest one with room does
    least = setup.pictures * shape.sight.tokens if shape.sight else 0
    return _most(MOST_TOKENS, lambda n: _peak(shape, replace(single, length=max(n, least))) <= nbytes)


def _largest_rank(shape: Shape, setup: Setup, nbytes: int) -> int:
    if setup.method not in LOW_RANK:
        return 0
    # beyond a layer's own rank a larger r expresses nothing more
    linears, experts = targeted(shape, setup)
    largest = max(min(matrix.out_features, matrix.in_features) for matrix in (*linears, *experts))
    return _most(largest, lambda r: _peak(shape, replace(setup, r=r)) <= nbytes)


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """Return the largest number from 1 to `limit` that fits, 0 if none does. A larger number must need more memory."""
    low, high = 0, limit + 1  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _settings(setup: Setup) -> dict[str, Any]:
    return {
        "batch_size": setup.batch_size,
        "micro_batch_size": setup.micro_batch_size,
        "max_length": setup.length,
        "packing": setup.packing,
        "gradient_checkpointing": setup.gradient_checkpointing,
        "optimizer_bits": setup.optimizer_bits,
        "optimizer_budget": setup.optimizer_budget,
    }


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB"
