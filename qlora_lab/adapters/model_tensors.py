"""Every tensor that a model holds, by kind: packed weights, adapters, experts, embeddings, head, norms and the rest.

A tensor that two modules share, such as a tied head, comes once for each of them.
"""

from collections.abc import Iterator

import torch
from torch import nn

from qlora_lab.adapters.adapter import Adapter
from qlora_lab.adapters.add_adapter import MAKERS
from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.model.experts import gates, layout_of
from qlora_lab.model.experts4bit import PlainStack
from qlora_lab.model.linear4bit import head_path, is_linear
from qlora_lab.model.packed_module import PackedModule
from qlora_lab.quant.quantize import Quantized
from qlora_lab.quant.stack import QuantizedStack

PACKED, LINEAR, EMBEDDINGS, HEAD = "packed weights", "linear layers", "embeddings", "head"
PACKED_EXPERTS, EXPERTS, ROUTER = "packed experts", "experts", "routers"
OTHER = "other tensors"
# The kind of what learns: its name in LoRA and its relatives, otherwise its method. Constants go by their names.
ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector", *MAKERS, "lengths", "first_A", "first_B")


def model_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | Quantized]]:
    """Yield (kind, tensor) for each packed weight, parameter and buffer; kind: a constant above, or one of ADAPTER."""
    # the gate of a shared expert is a plain linear layer, and counts as a router
    linears = dict.fromkeys(gates(model), ROUTER) | {head_path(model): HEAD}
    made = [module for module in model.modules() if isinstance(module, Adapter)]
    made = [adapter for adapter in made if adapter.method != "full"]  # there each weight keeps its kind
    kinds = {id(p): _learned_kind(adapter, name) for adapter in made for name, p in adapter.learned().items()}
    kinds |= {id(constant): name for adapter in made for name, constant in adapter.constants().items()}
    for path, module in model.named_modules():
        buffers = module.named_buffers(recurse=False)
        if isinstance(module, PackedModule):
            yield PACKED_EXPERTS if isinstance(module.weight, QuantizedStack) else PACKED, module.weight
            buffers = ()  # the same tensors
        for name, tensor in (*module.named_parameters(recurse=False), *buffers):
            yield kinds.get(id(tensor)) or _kind(module, name, tensor, linears.get(path, LINEAR)), tensor


def _learned_kind(adapter: Adapter, name: str) -> str:
    return name if isinstance(adapter, LoRALinear) else adapter.method


def _kind(module: nn.Module, name: str, tensor: torch.Tensor, linear: str) -> str:
    """linear: what the module is if it is a linear layer."""
    if isinstance(module, nn.Embedding):
        return EMBEDDINGS
    if is_linear(module) and name == "weight":
        return linear
    if isinstance(module, PlainStack) or (tensor.dim() == 3 and layout_of(module)):
        return EXPERTS
    if name.endswith("bias"):  # of experts, too, which have a row for each
        return "biases"
    if name.endswith("inv_freq"):
        return "rotary frequencies"
    if tensor.dim() == 1 or "norm" in type(module).__name__.lower():  # Cohere's norms have a row for each head
        return "norms"
    if tensor.dim() == 2 and name == "weight":  # most routers are classes of their own
        return ROUTER
    return OTHER  # such as a tower's convolution over patches, or Gemma 3's projection
