"""Count how much of a model is in 4 bits: only linear layers are, and some families keep most weights elsewhere.

All parameters count but those of embeddings and head, which keep their precision in every model. Of a model that sees
the language model counts alone: its tower and its projector are left in their precision on purpose.
"""

import warnings
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from torch import nn

from qlora_lab.model.experts import layout_of
from qlora_lab.model.language_model import beside, language_model
from qlora_lab.model.layer_kinds import is_turned
from qlora_lab.model.linear4bit import head_path
from qlora_lab.model.packed_module import PackedModule

ENOUGH = 0.9  # a LLaMA has 98 % or more, and so have mixtures of experts; Mamba has half
NAMED = 3  # others in the line


class Share(NamedTuple):
    """Weights outside embeddings and head, and how many of them are in 4 bits."""

    in_4_bits: int
    weights: int
    others: tuple[str, ...]  # names of those that are not, largest first
    turned: int = 0  # layers and stacks that are quantised as their transpose: GPT-2's Conv1D, GPT-OSS's experts
    sees: bool = False  # the model reads pictures, too, and only its language model is counted

    @property
    def part(self) -> float:
        return self.in_4_bits / self.weights

    @property
    def is_enough(self) -> bool:
        return self.part >= ENOUGH

    def __str__(self) -> str:
        whose = "the language model's" if self.sees else "the"
        said = f"{100 * self.part:.1f} % of {whose} weights outside embeddings and head are in 4 bits"
        said += f", {self.turned} of the tensors as their transpose" * bool(self.turned)
        if self.is_enough:
            return said
        more = f" and {len(self.others) - NAMED} more" if len(self.others) > NAMED else ""
        return f"{said}; the largest others: {', '.join(self.others[:NAMED])}{more}"

    def warn_if_small(self, stacklevel: int) -> None:
        """Warn if it is not enough. stacklevel: as in warnings.warn, counted from the caller."""
        if not self.is_enough:
            warnings.warn(str(self), stacklevel=stacklevel + 1)


def in_4_bits(model: nn.Module, layers: Collection[str] = ()) -> Share:
    """Return the Share of `model`: of its packed weights, or of the paths in `layers` if it is not quantised yet."""
    left_out = beside(model) | {head_path(model)}  # the head, whatever it is called
    packed = 0
    total = 0
    others = Counter()
    turned = 0
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) or path in left_out:
            continue
        if isinstance(module, PackedModule):
            turned += is_turned(module)
            packed += module.weight.shape.numel()  # weights, not packed bytes
            total += module.weight.shape.numel()
        for name, parameter in module.named_parameters(recurse=False):
            total += parameter.numel()
            layer = path if name == "weight" else f"{path}.{name}"  # a linear layer, or a stack of experts
            if layer in layers:
                packed += parameter.numel()
                turned += is_turned(module) if layer == path else layout_of(module).turned
            else:
                others[_pattern(f"{path}.{name}")] += parameter.numel()
    return Share(packed, total, tuple(name for name, _ in others.most_common()), turned, bool(language_model(model)))


def _pattern(name: str) -> str:
    """Return one name for all layers: "h.*.mlp" for "h.7.mlp"."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
