"""num_parameters of a model of transformers, which counts a 4-bit weight as what it stands for.

transformers counts Parameters, and twice those of bitsandbytes, which are two weights a byte. A packed module has none.
"""

import weakref
from typing import TYPE_CHECKING

from torch import nn

from qlora_lab.model.packed_module import PackedModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ParameterCount:
    """What a loaded model calls as num_parameters. Its reference is weak: a circle would keep a deleted model."""

    def __init__(self, model: "PreTrainedModel"):
        self.model = weakref.ref(model)

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count weights, those in 4 bits too, which are never trainable. The options are those of transformers."""
        model = self.model()
        others = type(model).num_parameters(model, only_trainable, exclude_embeddings)
        return others if only_trainable else others + _packed(model)

    def __reduce__(self) -> tuple:
        return ParameterCount, (self.model(),)  # a copy of the model gets a count of its own


def _packed(model: nn.Module) -> int:
    return sum(module.weight.numel for module in model.modules() if isinstance(module, PackedModule))
