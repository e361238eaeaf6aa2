"""AdamW whose two moments lie in pages: what it computes is torch.optim.AdamW, what it holds is a budget.

In: parameters with gradients. Changed: the parameters, in place, and the pages.
Source: "Decoupled Weight Decay Regularization", algorithm 2; QLoRA section 3, "Paged Optimizers".

All parameters lie one after another in the pages, so that small ones, such as an adapter's, are paged as well; a page
holds the first moments of its elements and then the second ones, float32. A step goes over the parameters in order and
asks for their pages one by one. Every operation is one element's own, so the order of pages changes no bit.

But: no amsgrad, no maximize, no sparse gradients; moments are float32, 8 bytes a parameter, whatever its dtype.
Not here: pages (paging.py), moments of 8 bits (adamw_8bit.py).
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from qlora_lab.finetune.paging import PAGE_SIZE, Pages

BYTES = 8  # of state for each element: two float32


class PagedAdamW(torch.optim.Optimizer):
    """As torch.optim.AdamW, with `page_size` and `budget` in bytes and `folder` for the pages' file (see Pages).

    state_dict() and load_state_dict() speak torch.optim.AdamW's form, so either can go on where the other stopped.
    Raises ValueError for a hyperparameter out of range, a page size that is no multiple of 8 bytes, a parameter that is
    not on the CPU, and what Pages raises.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        page_size: int = PAGE_SIZE,
        budget: int | None = None,
        folder: str | Path | None = None,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"{name}={value} is not allowed: it is at least 0")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas} are not allowed: each is at least 0 and less than 1")
        if page_size < BYTES or page_size % BYTES:
            raise ValueError(f"page_size={page_size} is not allowed: it is a multiple of {BYTES} bytes, one element's")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for number, p in enumerate(self._parameters()):
            if p.device.type != "cpu":
                raise ValueError(
                    f"parameter {number} is on {p.device}: pages are in the CPU's memory, and so must it be"
                )
        self._first, elements = {}, 0  # parameter -> its first element in the pages
        for p in self._parameters():
            self._first[p], elements = elements, elements + p.numel()
        self.pages = Pages(elements * BYTES, page_size, budget, folder)

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
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)
        return loss

    def _step(self, p: torch.Tensor, group: dict) -> None:
        state = self.state[p]
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        step, (beta1, beta2) = state["step"].item(), group["betas"]
        size = group["lr"] / (1 - beta1**step)
        correction = (1 - beta2**step) ** 0.5
        flat, grad = p.reshape(-1), p.grad.reshape(-1)  # (numel,); a copy where p is not contiguous, or not float32
        values = flat.float()
        for m, v, part in self._moments(p):
            g = grad[part].float()
            values[part].mul_(1 - group["lr"] * group["weight_decay"])
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            values[part].addcdiv_(m, (v.sqrt() / correction).add_(group["eps"]), value=-size)
        if values.data_ptr() != p.data_ptr():
            p.copy_(values.view(p.shape))

    def _moments(self, p: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
        """First and second moments of p page by page, to change in place, and where in p they belong."""
        each, done, first = self.pages.page_size // BYTES, 0, self._first[p]
        while done < p.numel():
            page, at = divmod(first + done, each)
            n = min(each - at, p.numel() - done)
            m, v = self.pages.page(page).view(torch.float32).view(2, each)[:, at : at + n]
            yield m, v, slice(done, done + n)
            done += n

    def _parameters(self) -> Iterator[torch.Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.AdamW's: step, exp_avg and exp_avg_sq (float32) of each parameter by its number."""
        whole = super().state_dict()
        state = {}
        for number, p in enumerate(self._parameters()):
            if p in self.state:
                moments = torch.empty(2, p.numel())
                for m, v, part in self._moments(p):
                    moments[0, part], moments[1, part] = m, v
                averages = {name: half.view(p.shape) for name, half in zip(AVERAGES, moments, strict=True)}
                state[number] = {"step": self.state[p]["step"], **averages}
        return whole | {"state": state}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of either optimizer. Raises ValueError, and changes nothing, where groups or shapes differ."""
        given = state_dict["state"]
        for number, p in enumerate(self._parameters()):
            for name in AVERAGES if number in given else ():
                if given[number][name].shape != p.shape:
                    found = tuple(given[number][name].shape)
                    raise ValueError(f"{name} of parameter {number} has shape {found}, the parameter {tuple(p.shape)}")
        steps = {number: {"step": one["step"]} for number, one in given.items()}
        super().load_state_dict(state_dict | {"state": steps})
        for number, p in enumerate(self._parameters()):
            if number in given:
                halves = [given[number][name].reshape(-1) for name in AVERAGES]
                for m, v, part in self._moments(p):
                    m.copy_(halves[0][part])
                    v.copy_(halves[1][part])


AVERAGES = "exp_avg", "exp_avg_sq"  # torch's names of the two moments
