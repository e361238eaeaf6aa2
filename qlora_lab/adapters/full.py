"""Full fine-tuning: every weight learns, of the model or of named parts. It is what other methods are compared with.

In: a model whose weights that learn are bf16 or float32. Out: the same model.
LLaVA is trained in two stages (arXiv 2304.08485, section 4.2): first its projector alone, which may stand beside a
language model in 4 bits, then the language model.
A bf16 weight cannot take a small step: optim/master_copies.py keeps a float32 copy of each, which the optimizer moves.
Memory: 16 bytes a weight with 32-bit moments (weight 2, gradient 2, copy 4, moments 8), 10 with 8-bit moments; 4 more
while gradients of several micro-batches are summed.
"""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.adapters.parts import check_can_learn, tensors_in
from qlora_lab.model.language_model import as_names

PATH = "full_tuning"


class FullTuning(Adapter):
    """The mark of a model that learns as a whole, or in parts. It has no tensor of its own: those of `model` learn."""

    method = "full"

    def __init__(self, model: nn.Module, parts: tuple[str, ...] | None = None):
        super().__init__()
        self._whole = weakref.ref(model)  # a circle would keep a deleted model
        self.parts = parts

    def learned(self) -> dict[str, nn.Parameter]:
        return tensors_in(self._whole(), self.parts)

    def named(self, path: str) -> dict[str, nn.Parameter]:
        return self.learned()

    def put_into(self, model: nn.Module, path: str) -> None:
        model.add_module(path, self.train(model.training))
        for parameter in self.learned().values():  # put_into had frozen them
            parameter.requires_grad_(True)

    def take_out(self, model: nn.Module, path: str) -> None:
        what = "all weights" if self.parts is None else ", ".join(self.parts)
        raise ValueError(f"{what} of this model learned, so there is no base to go back to: load the model again")

    def settings(self) -> dict[str, Any]:
        return {} if self.parts is None else {"parts": self.parts}

    def __reduce_ex__(self, protocol):
        return FullTuning, (self._whole(), self.parts)  # a copy of the model has a mark of its own

    def _apply(self, fn, recurse: bool = True):
        return self  # the model applies it to its weights


def full(model: nn.Module, parts: str | Iterable[str] | None = None) -> dict[str, FullTuning]:
    """Let every weight of `model` learn, or those of the modules that `parts` names (parts.py).

    Raises ValueError for a name of no module, and for weights that cannot learn: packed ones, and float16.
    """
    parts = None if parts is None else as_names(parts, "parts")
    check_can_learn(model, parts)
    return {PATH: FullTuning(model, parts)}
