"""Quantise the weights of a model one at a time, linear layers and stacks of experts alike.

In: a model, and a weight as its family keeps it. Out: packed weights, and packed modules in the places of the family's.
"""

from collections.abc import Iterable

import torch
from torch import nn

from qlora_lab.model.experts import is_stack, stacks_of
from qlora_lab.model.experts4bit import pack_stack
from qlora_lab.model.layer_kinds import is_turned, out_and_in, turned
from qlora_lab.model.linear4bit import HEAD, Linear4bit, linears_to_quantise
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.quant.plan import Candidate, Plan, of_layers
from qlora_lab.quant.quantize import Quantized, quantize
from qlora_lab.quant.stack import QuantizedStack, quantize_stack


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
    """Return path -> options for each layer and each stack to quantise; none without a codebook and a plan.

    also: parts beside the language model. A plan that names no stack leaves all of them to the default. Raises
    ValueError for a plan of another model, and for a model without anything to quantise.
    """
    if options.codebook is None and plan is None:
        return {}
    numel = {path: shape.numel() for path, shape in shapes_to_quantise(model, also).items()}
    stacks = stacks_of(model)
    if plan is not None and stacks.keys().isdisjoint(plan.chosen):  # made by hand, or before plans knew experts
        numel = {path: n for path, n in numel.items() if path not in stacks}
    chosen = of_layers(options, plan, numel)
    return chosen | {path: options for path in stacks if path not in chosen}


def shapes_to_quantise(model: nn.Module, also: Iterable[str] = ()) -> dict[str, torch.Size]:
    """Return path -> (out_features, in_features) of each linear layer, and (experts, out, in) of each stack.

    Raises ValueError if there are none.
    """
    linears = {path: torch.Size(out_and_in(layer)) for path, layer in linears_to_quantise(model, also).items()}
    stacks = {path: turned(model, path, stack).shape for path, stack in stacks_of(model).items()}
    if not linears and not stacks:
        raise nothing_to_quantise(model)
    return linears | stacks


def nothing_to_quantise(model: nn.Module) -> ValueError:
    return ValueError(
        f"{type(model).__name__} has no linear layer to quantise besides {HEAD}: load it with codebook=None "
        "(on the command line: --codebook none)"
    )
