"""How much of a model is in 4 bits: only plain linear layers are, and some families keep most weights elsewhere.

In: a loaded model, or an empty one and the layers that will be quantised. Out: a Share, which says itself in one line.
Counted are all parameters but those of embeddings and of the head, which keep their precision in every model.
Not here: quantising them (load.py).
"""

import warnings
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from torch import nn

from qlora_lab.model.linear4bit import Linear4bit, head_path

ENOUGH = 0.9  # a LLaMA has 98 % or more; where experts are fused it is 11 to 43 %
NAMED = 3


class Share(NamedTuple):
    """Weights outside embeddings and head: how many are in 4 bits, of how many; names of the others, largest first."""

    in_4_bits: int
    weights: int
    others: tuple[str, ...]

    @property
    def part(self) -> float:
        return self.in_4_bits / self.weights

    @property
    def is_enough(self) -> bool:
        return self.part >= ENOUGH

    def __str__(self) -> str:
        said = f"{100 * self.part:.1f} % of the weights outside embeddings and head are in 4 bits"
        if self.is_enough:
            return said
        more = f" and {len(self.others) - NAMED} more" if len(self.others) > NAMED else ""
        return f"{said}; the largest others: {', '.join(self.others[:NAMED])}{more}"

    def warn_if_small(self, stacklevel: int) -> None:
        """Warn if it is not enough; stacklevel: as warnings.warn takes it, counted from the caller."""
        if not self.is_enough:
            warnings.warn(str(self), stacklevel=stacklevel + 1)


def in_4_bits(model: nn.Module, layers: Collection[str] = ()) -> Share:
    """The Share of `model`: its Linear4bit, and of a model that is not quantised yet the paths in `layers`."""
    head = head_path(model)
    packed, total, others = 0, 0, Counter()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or path == head:
            continue
        if isinstance(module, Linear4bit):
            packed += module.weight.shape.numel()
            total += module.weight.shape.numel()
        for name, parameter in module.named_parameters(recurse=False):
            total += parameter.numel()
            if path in layers and name == "weight":
                packed += parameter.numel()
            else:
                others[_pattern(f"{path}.{name}")] += parameter.numel()
    return Share(packed, total, tuple(name for name, _ in others.most_common()))


def _pattern(name: str) -> str:
    """One name for all layers: "h.*.mlp" for "h.7.mlp"."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
