"""Full fine-tuning: every weight learns, of the model or of the parts that are named. The others are compared with it.

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

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.model.language_model import as_names
from qlora_lab.model.packed_module import PackedModule

PATH = "full_tuning"


class FullTuning(Adapter):
    """The mark of a model that learns as a whole, or in parts. It has no tensor of its own: those of `model` learn."""

    method = "full"

    def __init__(self, model: nn.Module, parts: tuple[str, ...] | None = None):
        super().__init__()
        self._whole = weakref.ref(model)  # a circle would keep a deleted model
        self.parts = parts

    def learned(self) -> dict[str, nn.Parameter]:
        named = dict(self._whole().named_parameters())
        return {name: p for name, p in named.items() if self.parts is None or _is_in(name, self.parts)}

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
    """Let every weight of `model` learn, or of its modules that are named. Raises ValueError for a name of none.

    parts: ends of paths, such as "multi_modal_projector" or "language_model". None: the whole model.
    Raises ValueError also if what learns has packed weights, or is float16.
    """
    parts = None if parts is None else as_names(parts)
    for part in parts or ():
        if not any(_is_in(name, (part,)) for name, _ in model.named_parameters()):
            children = ", ".join(dict(_inner(model).named_children()))
            raise ValueError(f"no module with weights that can learn is called {part!r}: choose from {children}")
    marked = FullTuning(model, parts)
    modules = ((path, m) for path, m in model.named_modules() if parts is None or _is_in(f"{path}.", parts))
    packed = next((path for path, module in modules if isinstance(module, PackedModule)), None)
    if packed is not None:
        fix = "load it with codebook=None (--codebook none), or train an adapter"
        raise ValueError(f"full fine-tuning moves weights of 16 or 32 bits, but {packed} is packed in 4: {fix}")
    for name, parameter in marked.learned().items():
        if not parameter.is_floating_point() or parameter.dtype == torch.float16:
            why = "gradients in float16 overflow" if parameter.is_floating_point() else "it has no gradient"
            raise ValueError(
                f"full fine-tuning needs weights in bf16 or float32, but {name} is {parameter.dtype}: {why}"
            )
    return {PATH: marked}


def _is_in(name: str, parts: tuple[str, ...]) -> bool:
    """Tell whether the tensor `name` belongs to a module whose path ends with one of `parts`."""
    return any(f".{part}." in f".{name}" for part in parts)


def _inner(model: nn.Module) -> nn.Module:
    """Return the module inside which parts stand: for a model of transformers the one without the head."""
    return getattr(model, "base_model", model)
