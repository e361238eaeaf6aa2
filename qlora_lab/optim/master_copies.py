"""Float32 copies of 16-bit weights, on which an optimizer steps in their place.

    m <- step(m, gradient),   w <- round(m)

In: parameters of any dtype, and how to make an optimizer. Changed in place: the parameters.
Source: Micikevicius et al. (arXiv 1710.03740) section 3.1: an update below half a unit in the last place would vanish
in the weight; in its float32 copy updates add up.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

MASTER = "master"  # in the state of a parameter, beside its moments


class MasterCopies(torch.optim.Optimizer):
    """The optimizer that `make` returns, over copies. make: takes a list of float32 parameters.

    A parameter in float32 needs no copy. state_dict() holds the copies, so that a run resumes from their bits.
    """

    def __init__(self, params: Iterable[nn.Parameter], make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]):
        params = list(params)
        self.masters = [p if p.dtype == torch.float32 else nn.Parameter(p.detach().float()) for p in params]
        self.inner = make(self.masters)  # it never sees the 16-bit weights
        super().__init__(params, {"lr": self.inner.param_groups[0]["lr"]})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Move the copies by the gradients of the parameters, and round them into the parameters."""
        group = self.inner.param_groups[0]
        group["lr"] = self.param_groups[0]["lr"]
        try:
            for pairs in self._groups():
                group["params"] = [master for _, master in pairs]
                for p, master in pairs:  # one dtype for a weight and its gradient, as the optimizer expects
                    master.grad = None if p.grad is None else p.grad.float()
                self.inner.step()
                for p, master in pairs:
                    if p is not master:
                        p.copy_(master)  # rounds to nearest
                        master.grad = None
        finally:
            group["params"] = self.masters

    def _groups(self) -> list[list[tuple[nn.Parameter, nn.Parameter]]]:
        """Cut the pairs into groups of neighbours, none with more elements than the largest parameter.

        All at once, their float32 gradients would take 4 bytes a weight; one at a time, no page would be prefetched.
        """
        most = max(map(torch.numel, self.masters))
        groups: list[list[tuple[nn.Parameter, nn.Parameter]]] = [[]]
        room = most
        for p, master in self._pairs():
            if master.numel() > room:
                groups.append([])
                room = most
            groups[-1].append((p, master))
            room -= master.numel()
        return groups

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return list(zip(self.param_groups[0]["params"], self.masters, strict=True))

    def state_dict(self) -> dict[str, Any]:
        state = self.inner.state_dict()["state"]
        for number, (p, master) in enumerate(self._pairs()):
            if p is not master and number in state:
                state[number] = state[number] | {MASTER: master.detach()}
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = {number: dict(parts) for number, parts in state_dict["state"].items()}
        for number, (p, master) in enumerate(self._pairs()):
            if p is master:
                continue
            # a weight that never had a gradient has no state: its copy is the weight
            stored = state.get(number, {}).pop(MASTER, None)
            master.copy_(p if stored is None else stored)
        self.inner.load_state_dict({"state": state, "param_groups": self.inner.state_dict()["param_groups"]})
