"""Every tensor that a model holds, told apart by kind: packed weights, adapters, embeddings, head, norms and the rest.

A tensor that two modules share, such as a tied head, comes once for each of them.
"""

from collections.abc import Iterator

import torch
from torch import nn

from qlora_lab.adapters.lora import LoRALinear
from qlora_lab.model.linear4bit import Linear4bit, head_path
from qlora_lab.quant.quantize import QuantizedTensor

PACKED, LINEAR, EMBEDDINGS, HEAD = "packed weights", "linear layers", "embeddings", "head"
ADAPTER = ("lora_A", "lora_B")  # an adapter's kind is its parameter's name


def model_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | QuantizedTensor]]:
    """Yield (kind, tensor) for each packed weight, parameter and buffer; kind: a constant above, or one of ADAPTER."""
    head = head_path(model)
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):  # its weight is neither a parameter nor a buffer
            yield PACKED, module.weight
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            yield _kind(module, name, path == head), tensor


def _kind(module: nn.Module, name: str, is_head: bool) -> str:
    if isinstance(module, LoRALinear):
        return name
    if isinstance(module, nn.Embedding):
        return EMBEDDINGS
    if isinstance(module, nn.Linear) and name == "weight":
        return HEAD if is_head else LINEAR
    if name == "bias":
        return "biases"
    return "rotary frequencies" if name.endswith("inv_freq") else "norms"
