"""AdamW whose two moments lie in pages: it computes what torch.optim.AdamW does, in a fixed budget of memory.

In: parameters with gradients. Changed in place: the parameters and the pages.
Source: "Decoupled Weight Decay Regularization", algorithm 2; QLoRA section 3, "Paged Optimizers".

All parameters lie one after another in the pages, so small ones, such as an adapter's, are paged too. With 32 bits a
page holds the first moments of its elements, then the second ones: float32, 8 bytes an element. With 8 bits it holds
the codes of both, then their constants: 520 bytes for each block of 256 (adamw_8bit.py). A step goes through the
parameters in order, asks for their pages one by one, and prefetches the next page while it computes on one. Each
element, or block, is changed by itself, so the order of pages changes no bit.

But: no amsgrad, no maximize, no sparse gradients; 32-bit moments are float32, whatever the dtype of a parameter. On a
GPU a step launches a dozen small kernels for each page and waits for the host.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from qlora_lab.optim.adamw_8bit import BLOCK, AdamW, Moments, change_8bit
from qlora_lab.optim.paging import PAGE_SIZE, Pages
from qlora_lab.quant.double_quant import dynamic_map
from qlora_lab.quant.numbers import check_number

UNIT = {32: (1, 8), 8: (BLOCK, 2 * BLOCK + 8)}  # bits: elements of a unit (never split), and bytes of their state
NAMES = {  # bits: the names of a state's parts
    32: ("exp_avg", "exp_avg_sq"),  # torch.optim.AdamW's
    8: ("state1", "state2", "absmax1", "absmax2"),  # bitsandbytes'
}
Piece = tuple[int, tuple[torch.Tensor, ...], slice]  # which parameter, parts of its state to change, where they belong
WRAPPED = "__bnb_optimizer_quant_state__"  # bitsandbytes' key for its 8-bit parts

# MKL computes torch's square roots and picks its code path in the first call. If two threads share that call, one may
# pick another path and round differently, so a step would differ between processes. One thread picks it here.
torch.ones(1, dtype=torch.float32).sqrt()


class PagedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW with moments of `bits` 32 or 8, paged on the device of the parameters.

    page_size, budget: in bytes. folder, store: as in Pages.
    state_dict() has torch.optim.AdamW's form, so either optimizer can continue from the other. With 8 bits its parts
    are those of bitsandbytes' AdamW8bit, and load_state_dict() reads that optimizer's state.
    Raises ValueError for a hyperparameter out of range, a page size that does not hold whole elements or blocks, and
    parameters that are not all on the CPU or all on one CUDA GPU; also what Pages raises.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        bits: int = 32,
        page_size: int = PAGE_SIZE,
        budget: int | None = None,
        folder: str | Path | None = None,
        store: str | None = None,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            number = value.item() if hasattr(value, "item") else value  # NumPy's, or a tensor, as torch.optim accepts
            check_number(name, number, lambda number: number >= 0, "a number of at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} are not allowed: choose each from 0 to below 1")
        if bits not in UNIT:
            raise ValueError(f"bits={bits} is not allowed: moments have 32 or 8 bits")
        self.bits = bits
        self._together, nbytes = UNIT[bits]
        if page_size < nbytes or page_size % 8:  # 8: constants behind the codes are read as float32
            allowed = f"a multiple of 8, at least {nbytes} with {bits} bits"
            raise ValueError(f"page_size={page_size} is not allowed: choose {allowed}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        device = self._device()
        # Lay all parameters out in one row of units and cut the row into pages: a page may hold many small parameters,
        # or a part of a large one. Each starts a new unit, as no block of 8-bit codes is shared between two parameters.
        self._first: dict[torch.Tensor, int] = {}  # parameter -> its first unit
        units = 0
        for p in self._parameters():
            self._first[p] = units
            units += self._units_of(p)
        self._units = page_size // nbytes  # in a page; the bytes that are left over stay unused
        n_pages = -(-units // self._units)
        self.pages = Pages(n_pages * page_size, page_size, budget, folder, device, store)

    def _device(self) -> torch.device:
        device = next((p.device for p in self._parameters()), torch.device("cpu"))
        for number, p in enumerate(self._parameters()):
            if p.device != device or device.type not in ("cpu", "cuda"):
                where = "move all parameters to the CPU or to one CUDA GPU"
                raise ValueError(f"parameter {number} is on {p.device}, where its pages cannot be: {where}")
        return device

    def _units_of(self, p: torch.Tensor) -> int:
        return -(-p.numel() // self._together)  # rounded up: the last block may be partial

    def add_param_group(self, param_group: dict) -> None:
        if hasattr(self, "pages"):  # not yet when torch adds the first groups
            raise ValueError("the pages are laid out already: make a new PagedAdamW of all groups")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        todo = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for number, pieces in groupby(self._pieces([p for p, _ in todo]), key=itemgetter(0)):
            self._step(*todo[number], pieces)
        return loss

    def _step(self, p: torch.Tensor, group: dict, pieces: Iterable[Piece]) -> None:
        state = self.state[p]
        state["step"] = state.get("step", torch.tensor(0.0, dtype=torch.float32)) + 1
        settings = AdamW(int(state["step"].item()), group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        flat = p.reshape(-1)  # (numel,): a view, or a copy where p is not contiguous
        grad = p.grad.reshape(-1)
        for _, parts, where in pieces:
            values = flat[where].float()  # a view of float32, a copy of any other dtype
            g = grad[where].float()
            if self.bits == 32:
                _adamw(values, g, *parts, settings)
            else:
                codes1, codes2, scale1, scale2 = parts
                change_8bit(values, g, Moments(codes1, scale1, codes2, scale2), settings)
            if values.dtype != flat.dtype:
                flat[where] = values  # the copy, rounded back
        if flat.data_ptr() != p.data_ptr():
            p.copy_(flat.view(p.shape))

    def _pieces(self, params: list[torch.Tensor]) -> Iterator[Piece]:
        """Go page by page, prefetching the next page that is needed."""
        spans = list(self._spans(params))
        order = [page for page, _ in groupby(spans, key=itemgetter(0))]
        for (page, in_page), following in zip_longest(groupby(spans, key=itemgetter(0)), order[1:]):
            bytes_ = self.pages.page(page)  # (page_size,) uint8
            if following is not None:
                self.pages.prefetch(following)  # comes while the caller computes on this one
            for _, number, first, end, where in in_page:
                yield number, self._parts(bytes_, first, end, where.stop - where.start), where

    def _spans(self, params: list[torch.Tensor]) -> Iterator[tuple[int, int, int, int, slice]]:
        """Yield the page, the number of a parameter in it, its units there (first, end), and its elements in them."""
        for number, p in enumerate(params):
            done = 0  # units of p
            while done < self._units_of(p):
                page, first = divmod(self._first[p] + done, self._units)
                end = min(self._units, first + self._units_of(p) - done)  # p ends here, or goes on in the next page
                start = done * self._together
                done += end - first
                yield page, number, first, end, slice(start, min(done * self._together, p.numel()))

    def _parts(self, page: torch.Tensor, first: int, end: int, numel: int) -> tuple[torch.Tensor, ...]:
        """Views of what a page holds for its units from `first` to before `end`, in the order of NAMES."""
        if self.bits == 32:
            moments = page.view(torch.float32)[: 2 * self._units].view(2, -1)  # (2, units)
            return moments[:, first:end].unbind()
        codes = page[: 2 * BLOCK * self._units].view(2, -1)  # (2, units * 256)
        scales = page[2 * BLOCK * self._units :][: 8 * self._units].view(torch.float32).view(2, -1)  # (2, units)
        return *codes[:, first * BLOCK : first * BLOCK + numel], *scales[:, first:end]

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """Return the state by parameter number, on the CPU: step, exp_avg and exp_avg_sq, as in torch.optim.AdamW.

        With 8 bits, as in bitsandbytes: state1, state2 (codes), absmax1, absmax2, and the tables qmap1, qmap2.
        """
        state = {}
        for number, p in enumerate(self._parameters()):
            if p in self.state:
                # To the CPU: the parameters' device may have no room for all of it, which is why it is paged.
                pieces = [[part.to("cpu", copy=True) for part in parts] for _, parts, _ in self._pieces([p])]
                whole = dict(zip(NAMES[self.bits], map(torch.cat, zip(*pieces, strict=True)), strict=True))  # (numel,)
                shaped = {k: v if k.startswith("absmax") else v.view(p.shape) for k, v in whole.items()}
                maps = {"qmap1": dynamic_map(), "qmap2": dynamic_map(signed=False)} if self.bits == 8 else {}
                state[number] = {"step": self.state[p]["step"], **shaped, **maps}
        return super().state_dict() | {"state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of either optimizer. Where groups, names or shapes differ: ValueError, and nothing changes."""
        saved = {number: state | state.get(WRAPPED, {}) for number, state in state_dict["state"].items()}
        for number, p in enumerate(self._parameters()):
            for name in NAMES[self.bits] if number in saved else ():
                expected = (-(-p.numel() // BLOCK),) if name.startswith("absmax") else tuple(p.shape)
                shape = tuple(saved[number][name].shape) if name in saved[number] else None
                if shape != expected:
                    raise ValueError(f"{name} of parameter {number} has shape {shape}, but it must be {expected}")
        done = {number: torch.tensor(float(state["step"]), dtype=torch.float32) for number, state in saved.items()}
        steps = {number: {"step": step} for number, step in done.items()}
        had_state = {p for p in self._parameters() if p in self.state}
        super().load_state_dict(state_dict | {"state": steps})  # groups and steps only: moments go into pages
        for number, p in enumerate(self._parameters()):
            if number not in saved and p in had_state:  # its first step is still to come: no moments yet
                for _, parts, _ in self._pieces([p]):
                    for part in parts:
                        part.zero_()
            elif number in saved:
                whole = [saved[number][name].reshape(-1) for name in NAMES[self.bits]]
                done = [0] * len(whole)  # elements of each that are in pages
                for _, parts, _ in self._pieces([p]):
                    for i, part in enumerate(parts):
                        part.copy_(whole[i][done[i] : done[i] + len(part)])
                        done[i] += len(part)


def _adamw(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, settings: AdamW) -> None:
    """Change p, m and v, all (n,) float32, by the operations of torch.optim.AdamW in its order: the same bits."""
    p.mul_(1 - settings.lr * settings.weight_decay)
    m.lerp_(g, 1 - settings.beta1)
    v.mul_(settings.beta2).addcmul_(g, g, value=1 - settings.beta2)
    spread = (v.sqrt() / (1 - settings.beta2**settings.step) ** 0.5).add_(settings.eps)
    p.addcdiv_(m, spread, value=-settings.lr / (1 - settings.beta1**settings.step))
