"""Let experts in their own precision compute one by one for a while, so that each product can be watched.

In: a mixture that is not packed. Inside the `with` block its modules of experts compute as packed ones do, without
being packed: a loop in place of one grouped product, so slower. At the end the family's own modules are back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from qlora_lab.model.experts import DOWN, experts_of, layout_of
from qlora_lab.model.experts4bit import Experts4bit, PlainStack

Watch = Callable[[str, str, int, torch.Tensor, torch.Tensor], None]


class _WatchedStack(PlainStack):
    def __init__(self, weight: nn.Parameter, turned: bool, watch: Callable[[int, torch.Tensor, torch.Tensor], None]):
        super().__init__(weight, turned)
        self.watch = watch

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        y = super().forward(x, expert)
        self.watch(expert, x, y)  # before a bias is added, which changes no gradient
        return y


@contextmanager
def one_by_one(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Call watch(path, name, expert, x, y) after each product y, (rows, out_features), of an expert's rows x.

    path: of the module of experts. name: of the stack in it.
    """
    theirs = {path: module for path, module in experts_of(model).items() if not isinstance(module, Experts4bit)}
    for path, experts in theirs.items():
        model.set_submodule(path, _watched(experts, partial(watch, path)))
    try:
        yield
    finally:
        for path, experts in theirs.items():
            model.set_submodule(path, experts)


def _watched(experts: nn.Module, watch: Callable[[str, int, torch.Tensor, torch.Tensor], None]) -> Experts4bit:
    layout = layout_of(experts)
    made = Experts4bit(experts)  # its dict of parameters is a copy, so the family's own module keeps all of its
    for name in (layout.up, DOWN):
        weight = made._parameters.pop(name)
        made.add_module(name, _WatchedStack(weight, layout.turned, partial(watch, name)))
    return made
