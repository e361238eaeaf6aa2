"""A small checkpoint in 4 bits, for the tests of its explorer."""

import torch
from safetensors.torch import save_file

from qlora_lab.export.xray import Checkpoint
from qlora_lab.quant.quantize import quantize
from qlora_lab.quant.serialize import to_tensors

SMALL, ODD = "model.layers.0.k.weight", "model.layers.0.v.weight"  # 96 bytes of fp4; 61 of nf4, half a byte of padding


def toy_checkpoint(folder):
    """Two tensors, one with double quantization, and one that is not quantised."""
    draws = torch.Generator().manual_seed(0)
    small = to_tensors(quantize(torch.randn(8, 24, generator=draws), "fp4", 32), SMALL)
    odd = to_tensors(quantize(torch.randn(11, 11, generator=draws), "nf4", 16, double_quant=True), ODD)
    tensors = small | odd | {"model.norm.weight": torch.ones(8)}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "toy.safetensors")
    return Checkpoint(folder / "toy.safetensors")
