"""Quantise the weights of a model one at a time, linear layers and stacks of experts alike.

In: a model, and a weight as its family keeps it. Out: packed weights, and packed modules in the places of the family's.
"""

from collections.abc import Iterable

import torch
from torch import nn

from qlora_lab.model.experts import is_stack, stacks_of
from qlora_lab.model.experts4bit import pack_stack
from qlora_lab.model.layer_kinds import is_turned, turned
from qlora_lab.model.linear4bit import HEAD, Linear4bit, linears_to_quantise
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.quant.plan import Candidate, Plan, of_layers
from qlora_lab.quant.quantize import quantize
from qlora_lab.quant.stack import Quantized, QuantizedStack, quantize_stack


def quantised(model: nn.Module, path: str, weight: torch.Tensor, options: Candidate) -> Quantized:
    """Quantise the weight of the layer, or the stack, at `path`, given as the family keeps it."""
    # A stack is a parameter, so its path is its name; a layer's weight is named below the layer.
    if is_stack(model, path):
        return quantize_stack(turned(model, path, weight), *options, name=path)
    name = f"{path}.weight"
    return quantize(turned(model, name, weight), *options, name=name)


def put(model: nn.Module, path: str, weight: Quantized) -> PackedModule:
    """Put a packed weight in the place of the family's own at `path`. Returns the module that holds it."""
    if isinstance(weight, QuantizedStack):
        return pack_stack(model, path, weight)
    layer = model.get_submodule(path)  # its bias stays a parameter, in its own precision
    packed = Linear4bit(weight, layer.bias, is_turned(layer))
    model.set_submodule(path, packed)
    return packed


def options_of(
    model: nn.Module, options: Candidate, plan: Plan | None, also: Iterable[str] = ()
) -> dict[str, Candidate]:
    """Return path -> options for each layer and each stack to quantise. also: parts beside the language model.

    A plan names linear layers; experts beside it are quantised as by default. Raises ValueError for a plan of another
    model, and for a model without anything to quantise.
    """
    # Plans come from a calibration of linear layers; experts see too few tokens each to be calibrated alike.
    linears, stacks = linears_to_quantise(model, also), stacks_of(model)
    if not linears and not stacks:
        raise nothing_to_quantise(model)
    numel = {path: layer.weight.numel() for path, layer in linears.items()}
    return of_layers(options, plan, numel) | dict.fromkeys(stacks, options)


def nothing_to_quantise(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} has no linear layer to quantise besides {HEAD}: load it with codebook=None "
        "(on the command line: --codebook none)"
    )
