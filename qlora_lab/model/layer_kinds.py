"""What a layer computes, told by its structure: whether it is a matrix product, and which way its matrix lies.

In: a module. Out: whether y = x W^T + b is all that it computes, and W as a matrix, (out_features, in_features).
GPT-2's Conv1D keeps W as (in_features, out_features). Blocks must lie along the inputs, as everywhere else, so its
transpose is quantised; so does bitsandbytes.
"""

import sys
from functools import lru_cache

import torch
from torch import nn

from qlora_lab.model.experts import is_stack, layout_of, matrices

LAYERS = "transformers.pytorch_utils"  # the module with Conv1D; a model that has one has imported it


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether `module` is a Conv1D of transformers, without importing transformers, which takes seconds."""
    return LAYERS in sys.modules and isinstance(module, sys.modules[LAYERS].Conv1D)


def is_product(module: nn.Module) -> bool:
    """Tell whether `module` computes x W^T + b and no more: an nn.Linear, a subclass that computes the same, a Conv1D.

    A subclass that keeps nn.Linear's own forward is left out: it has another purpose, which its forward does not show.
    """
    return type(module) is nn.Linear or is_conv1d(module) or _computes_a_product(type(module))


@lru_cache
def _computes_a_product(kind: type[nn.Module]) -> bool:
    """Run the forward of a subclass of nn.Linear on a plain layer: Falcon's passes, Llama 4's router does not."""
    # Once for each class: a model has thousands of layers, and a handful of classes.
    if not issubclass(kind, nn.Linear) or kind.forward is nn.Linear.forward:
        return False
    # on meta, without values, so torch's random numbers stay where they are
    plain = nn.Linear(3, 2, dtype=torch.float32, device="meta")
    plain.weight = nn.Parameter(torch.arange(6, dtype=torch.float32).view(2, 3))
    plain.bias = nn.Parameter(torch.tensor([10.0, 20.0], dtype=torch.float32))
    # small whole numbers, so any order of summing is exact
    x = torch.tensor([[[1.0, 2.0, 4.0]]], dtype=torch.float32)  # (1, 1, 3)
    try:
        y = kind.forward(plain, x)
    except Exception:  # anything at all: it needs what a plain layer lacks, such as a router's top_k
        return False
    return torch.is_tensor(y) and torch.equal(y, plain(x))


def is_turned(layer: nn.Module) -> bool:
    """Tell whether the family's own layer keeps (in_features, out_features); a Linear4bit remembers it."""
    return is_conv1d(layer) or getattr(layer, "turned", False)


def as_matrix(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Return the weight of `layer`, as the family keeps it, as (out_features, in_features): for a Conv1D a view."""
    return weight.t() if is_conv1d(layer) else weight


def out_and_in(layer: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features) of a layer for which is_product holds, or of a Linear4bit."""
    return (layer.nf, layer.nx) if is_conv1d(layer) else (layer.out_features, layer.in_features)


def turned(model: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor called `name`, from the family's layout to matrices or back: a transpose, or the tensor itself.

    Transposed are weights of a Conv1D, and stacks of experts that lie the same way.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight":  # of a Linear4bit too, which remembers how its family keeps it
        return tensor.t() if is_turned(module) else tensor
    return matrices(tensor, layout_of(module).turned) if is_stack(model, name) else tensor


def kept_shape(layer: nn.Module) -> torch.Size:
    """Return the shape that the family's files give the weight of `layer`, in 4 bits or not."""
    shape = layer.weight.shape  # of packed weights (out, in); of the family's own as it lies
    return torch.Size(shape[::-1]) if getattr(layer, "turned", False) else shape
