"""Full fine-tuning: every weight of the model learns. It is what the other methods are compared with.

In: a model whose weights are bf16 or float32. Out: the same model, of which everything learns.
A bf16 weight cannot take a small step: optim/master_copies.py keeps a float32 copy of each, which the optimizer moves.
Memory: 16 bytes a weight with 32-bit moments (weight 2, gradient 2, copy 4, moments 8), 10 with 8-bit moments; 4 more
while gradients of several micro-batches are summed.
"""

import weakref
from typing import Any

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.model.packed_module import PackedModule

PATH = "full_tuning"


class FullTuning(Adapter):
    """The mark of a model that learns as a whole. It has no tensor of its own: those of `model` learn."""

    method = "full"

    def __init__(self, model: nn.Module):
        super().__init__()
        self._whole = weakref.ref(model)  # a circle would keep a deleted model

    def learned(self) -> dict[str, nn.Parameter]:
        return dict(self._whole().named_parameters())

    def named(self, path: str) -> dict[str, nn.Parameter]:
        return self.learned()

    def put_into(self, model: nn.Module, path: str) -> None:
        model.add_module(path, self.train(model.training))
        model.requires_grad_(True)  # put_into had frozen it

    def take_out(self, model: nn.Module, path: str) -> None:
        raise ValueError("all weights of this model learned, so there is no base to go back to: load the model again")

    def settings(self) -> dict[str, Any]:
        return {}

    def __reduce_ex__(self, protocol):
        return FullTuning, (self._whole(),)  # a copy of the model has a mark of its own

    def _apply(self, fn, recurse: bool = True):
        return self  # the model applies it to its weights


def full(model: nn.Module) -> dict[str, FullTuning]:
    """Let every weight of `model` learn. Raises ValueError for packed weights, and for float16."""
    packed = next((path for path, module in model.named_modules() if isinstance(module, PackedModule)), None)
    if packed is not None:
        fix = "load it with codebook=None (--codebook none), or train an adapter"
        raise ValueError(f"full fine-tuning moves weights of 16 or 32 bits, but {packed} is packed in 4: {fix}")
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype == torch.float16:
            why = "gradients in float16 overflow" if parameter.is_floating_point() else "it has no gradient"
            raise ValueError(
                f"full fine-tuning needs weights in bf16 or float32, but {name} is {parameter.dtype}: {why}"
            )
    return {PATH: FullTuning(model)}
