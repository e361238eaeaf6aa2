"""AdamW whose two moments lie in pages: what it computes is torch.optim.AdamW, what it holds is a budget.

In: parameters with gradients. Changed: the parameters, in place, and the pages.
Source: "Decoupled Weight Decay Regularization", algorithm 2; QLoRA section 3, "Paged Optimizers".

All parameters lie one after another in the pages, so that small ones, such as an adapter's, are paged as well. With 32
bits a page holds the first moments of its elements and then the second ones, float32, 8 bytes an element; with 8 bits
the codes of both and then their constants, 520 bytes for each block of 256 (adamw_8bit.py). A step goes over the
parameters in order, asks for their pages one by one, and has the next one brought while it computes on one. Every
element, or block, is changed by itself, so the order of pages changes no bit.

But: no amsgrad, no maximize, no sparse gradients; 32-bit moments are float32, whatever the dtype of a parameter. A step
on a GPU is some dozen small launches for each page, so it waits for the host.
Not here: pages (paging.py), the arithmetic of 8 bits (adamw_8bit.py).
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, zip_longest
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from qlora_lab.optim.adamw_8bit import BLOCK, AdamW, change_8bit
from qlora_lab.optim.paging import PAGE_SIZE, Pages
from qlora_lab.quant.double_quant import dynamic_map

UNIT = {32: (1, 8), 8: (BLOCK, 2 * BLOCK + 8)}  # bits: elements that stay together, and bytes of their state
NAMES = {  # bits: what torch.optim.AdamW, and bitsandbytes, call the parts of a state
    32: ("exp_avg", "exp_avg_sq"),
    8: ("state1", "state2", "absmax1", "absmax2"),
}
Piece = tuple[int, tuple[torch.Tensor, ...], slice]  # which parameter, parts of its state to change, where they belong
WRAPPED = "__bnb_optimizer_quant_state__"  # under which bitsandbytes keeps them

# MKL, which takes torch's square roots, settles on its code in the first call. If two threads share that call, one may
# take another code and round otherwise, and a step is not the same in the next process. One thread settles it here.
torch.ones(1).sqrt()


class PagedAdamW(torch.optim.Optimizer):
    """As torch.optim.AdamW, with moments of `bits` 32 or 8; `page_size` and `budget` in bytes, `folder` and `store` as
    Pages has them, on the device of the parameters.

    state_dict() has torch.optim.AdamW's form, so either can go on where the other stopped; with 8 bits its parts are
    those of bitsandbytes' AdamW8bit, whose state_dict() can be loaded.
    Raises ValueError for a hyperparameter out of range, a page size that does not hold whole elements or blocks, a
    parameter that is not where the others are, on the CPU or a CUDA GPU, and what Pages raises.
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
            if value < 0:
                raise ValueError(f"{name}={value} is not allowed: it is at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} are not allowed: each is at least 0 and less than 1")
        if bits not in UNIT:
            raise ValueError(f"bits={bits} is not allowed: moments have 32 or 8")
        together, nbytes = UNIT[bits]
        if page_size < nbytes or page_size % 8:
            allowed = f"a multiple of 8, at least {nbytes} with {bits} bits"
            raise ValueError(f"page_size={page_size} is not allowed: {allowed}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        device = next((p.device for p in self._parameters()), torch.device("cpu"))
        for number, p in enumerate(self._parameters()):
            if p.device != device or device.type not in ("cpu", "cuda"):
                where = "the CPU or one CUDA GPU, where all parameters must be"
                raise ValueError(f"parameter {number} is on {p.device}: pages are on {where}")
        self.bits, self._first, units = bits, {}, 0  # parameter -> its first unit in the pages
        for p in self._parameters():
            self._first[p], units = units, units - (-p.numel() // together)
        self._units = page_size // nbytes  # of a page
        self.pages = Pages(-(-units // self._units) * page_size, page_size, budget, folder, device, store)

    def add_param_group(self, param_group: dict) -> None:
        if hasattr(self, "pages"):
            raise ValueError("a group is added after the pages were laid out: make a new PagedAdamW of all groups")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient. Returns what `closure` returns."""
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
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        how = AdamW(int(state["step"].item()), group["lr"], *group["betas"], group["eps"], group["weight_decay"])
        flat, grad = p.reshape(-1), p.grad.reshape(-1)  # (numel,); a copy where p is not contiguous
        for _, parts, where in pieces:
            values, g = flat[where].float(), grad[where].float()  # copies where they are not float32
            if self.bits == 32:
                _adamw(values, g, *parts, how)
            else:
                codes1, codes2, scale1, scale2 = parts
                change_8bit(values, g, codes1, scale1, codes2, scale2, how)
            if values.dtype != flat.dtype:
                flat[where] = values
        if flat.data_ptr() != p.data_ptr():
            p.copy_(flat.view(p.shape))

    def _pieces(self, params: list[torch.Tensor]) -> Iterator[Piece]:
        """Page by page, while the next page that is needed comes already."""
        spans = list(self._spans(params))
        order = [page for page, _ in groupby(spans, key=itemgetter(0))]
        for (page, here), following in zip_longest(groupby(spans, key=itemgetter(0)), order[1:]):
            bytes_ = self.pages.page(page)
            if following is not None:
                self.pages.prefetch(following)
            for _, number, at, end, where in here:
                yield number, self._parts(bytes_, at, end, where.stop - where.start), where

    def _spans(self, params: list[torch.Tensor]) -> Iterator[tuple[int, int, int, int, slice]]:
        """Page, which of `params` has units of it, from which to which, and the elements of the parameter in them."""
        together = UNIT[self.bits][0]
        for number, p in enumerate(params):
            done, n_units = 0, -(-p.numel() // together)
            while done < n_units:
                page, at = divmod(self._first[p] + done, self._units)
                end = min(self._units, at + n_units - done)
                first, done = done, done + end - at
                yield page, number, at, end, slice(first * together, min(done * together, p.numel()))

    def _parts(self, page: torch.Tensor, at: int, end: int, numel: int) -> tuple[torch.Tensor, ...]:
        """What lies in a page for its units from `at` to `end`, in the order of NAMES."""
        if self.bits == 32:
            return page.view(torch.float32)[: 2 * self._units].view(2, -1)[:, at:end].unbind()
        codes = page[: 2 * BLOCK * self._units].view(2, -1)
        scales = page[2 * BLOCK * self._units :][: 8 * self._units].view(torch.float32).view(2, -1)
        return *codes[:, at * BLOCK : at * BLOCK + numel], *scales[:, at:end]

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """Of each parameter by its number: step, and exp_avg and exp_avg_sq, float32, as torch.optim.AdamW has them,
        but always on the CPU.

        With 8 bits state1, state2 (codes), absmax1, absmax2, and their tables qmap1, qmap2, as bitsandbytes has them.
        """
        state = {}
        for number, p in enumerate(self._parameters()):
            if p in self.state:
                # to the CPU, whatever the device: there need not be room for all of it where the parameters are
                pieces = [[part.to("cpu", copy=True) for part in parts] for _, parts, _ in self._pieces([p])]
                whole = dict(zip(NAMES[self.bits], map(torch.cat, zip(*pieces, strict=True)), strict=True))
                shaped = {k: v if k.startswith("absmax") else v.view(p.shape) for k, v in whole.items()}
                maps = {"qmap1": dynamic_map(), "qmap2": dynamic_map(signed=False)} if self.bits == 8 else {}
                state[number] = {"step": self.state[p]["step"], **shaped, **maps}
        return super().state_dict() | {"state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of either optimizer. Raises ValueError, and changes nothing, where groups, names or shapes differ."""
        given = {number: one | one.get(WRAPPED, {}) for number, one in state_dict["state"].items()}
        for number, p in enumerate(self._parameters()):
            for name in NAMES[self.bits] if number in given else ():
                shape = (-(-p.numel() // BLOCK),) if name.startswith("absmax") else tuple(p.shape)
                found = tuple(given[number][name].shape) if name in given[number] else None
                if found != shape:
                    raise ValueError(f"{name} of parameter {number} has shape {found}, it must be {shape}")
        steps = {number: {"step": torch.tensor(float(one["step"]))} for number, one in given.items()}
        had = {p for p in self._parameters() if p in self.state}
        super().load_state_dict(state_dict | {"state": steps})
        for number, p in enumerate(self._parameters()):
            if number not in given and p in had:
                for _, parts, _ in self._pieces([p]):
                    for part in parts:
                        part.zero_()
            elif number in given:
                whole, done = [given[number][name].reshape(-1) for name in NAMES[self.bits]], [0] * 4
                for _, parts, _ in self._pieces([p]):
                    for i, part in enumerate(parts):
                        part.copy_(whole[i][done[i] : done[i] + len(part)])
                        done[i] += len(part)


def _adamw(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor, how: AdamW) -> None:
    """Change p, m and v, all (n,) float32, in the order of operations that torch.optim.AdamW has."""
    p.mul_(1 - how.lr * how.weight_decay)
    m.lerp_(g, 1 - how.beta1)
    v.mul_(how.beta2).addcmul_(g, g, value=1 - how.beta2)
    spread = (v.sqrt() / (1 - how.beta2**how.step) ** 0.5).add_(how.eps)
    p.addcdiv_(m, spread, value=-how.lr / (1 - how.beta1**how.step))
