"""Let experts in their own precision compute one by one for a while, so that each product can be watched.

In: a mixture that is not packed. Inside the `with` block its modules of experts compute as packed ones do, without
being packed: a loop in place of one grouped product, so slower. At the end the family's own modules are back.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qlora_lab.model.experts import experts_of
from qlora_lab.model.experts4bit import Experts4bit

Watch = Callable[[str, str, int, torch.Tensor, torch.Tensor], None]


class _Watched(Experts4bit):
    def __init__(self, experts: nn.Module, path: str, watch: Watch):
        super().__init__(experts)
        self.path = path
        self.watch = watch

    def _multiply(self, name: str, x: torch.Tensor, expert: int) -> torch.Tensor:
        y = super()._multiply(name, x, expert)
        self.watch(self.path, name, expert, x, y)
        return y


@contextmanager
def one_by_one(model: nn.Module, watch: Watch) -> Iterator[None]:
    """Call watch(path, name, expert, x, y) after each product y, (rows, out_features), of an expert's rows x.

    path: of the module of experts. name: of the stack in it.
    """
    theirs = {path: module for path, module in experts_of(model).items() if not isinstance(module, Experts4bit)}
    for path, experts in theirs.items():
        model.set_submodule(path, _Watched(experts, path, watch))  # parameters are shared, not copied
    try:
        yield
    finally:
        for path, experts in theirs.items():
            model.set_submodule(path, experts)
