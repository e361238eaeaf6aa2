"""One step of AdamW with both moments kept as 8-bit codes, in blocks of 256 with one float32 constant each.

In: flat parameters and gradients, (numel,) float32, bf16 or fp16, and Moments. Changed in place: all but the gradient.
Source: "8-bit Optimizers via Block-wise Quantization" (2021), sections 2 and 3; "Decoupled Weight Decay
Regularization", algorithm 2. The first moment takes the signed dynamic table, the second the unsigned one.

A moment is quantised as a weight is (absmax, then the code of the nearest level), but anew at every step.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from qlora_lab.kernels import choose
from qlora_lab.quant.blocks import TINY, block_absmax, scale_blocks, to_blocks
from qlora_lab.quant.codebook import midpoints, nearest_codes
from qlora_lab.quant.double_quant import dynamic_map

BLOCK = 256  # values that share a constant, as in bitsandbytes: 8 + 32/256 bits a value


@dataclass(frozen=True)
class AdamW:
    """The settings of one step, in the symbols of algorithm 2; lr already scheduled."""

    step: int  # t, from 1
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled: it shrinks the parameter and never enters a moment

    def __post_init__(self):
        if self.step < 1:
            raise ValueError(f"step={self.step} is not allowed: count from 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: choose from 0 to below 1")

    @property
    def scalars(self) -> tuple[float, ...]:
        """beta1, beta2, what decay leaves of a parameter, the step size, 1 / sqrt(1 - beta2^step), eps."""
        decay = 1 - self.lr * self.weight_decay
        size = self.lr / (1 - self.beta1**self.step)  # moments start at 0: early means are too small by this factor
        return self.beta1, self.beta2, decay, size, (1 - self.beta2**self.step) ** -0.5, self.eps


class Moments(NamedTuple):
    """Both moments of a parameter, quantised: codes, (numel,) uint8; constants, (ceil(numel / 256),) float32."""

    codes1: torch.Tensor
    scale1: torch.Tensor
    codes2: torch.Tensor
    scale2: torch.Tensor


@lru_cache
def tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels (256,) and thresholds (255,) of the first moment, then of the second; shared, so never change them."""
    with torch.inference_mode(False):  # a cached tensor from inference mode could not be used outside it
        first = dynamic_map().to(device)
        second = dynamic_map(signed=False).to(device)  # squares have no sign: twice the levels
        return first, midpoints(first), second, midpoints(second)


def dequantize_moment(codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(numel,) uint8 codes -> (numel,) float32."""
    return table[codes.int()] * scale.repeat_interleave(BLOCK)[: len(codes)]  # the last block may be partial


def quantize_moment(values: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(numel,) float32 -> codes (numel,) uint8, and constants (ceil(numel / 256),) float32."""
    blocks = to_blocks(values, BLOCK)  # (n_blocks, 256)
    scale = block_absmax(blocks)  # (n_blocks,)
    scale = scale.where(scale.isfinite(), torch.nan)  # one bad value loses its block, and no other
    return nearest_codes(scale_blocks(blocks, scale), table).view(-1)[: len(values)], scale


def adamw_8bit(param: torch.Tensor, grad: torch.Tensor, moments: Moments, settings: AdamW) -> None:
    """Change `param` and `moments` in place."""
    beta1, beta2, decay, size, correction, eps = settings.scalars
    first, _, second, _ = tables(param.device)
    g = grad.float()
    m = dequantize_moment(moments.codes1, moments.scale1, first) * beta1 + g * (1 - beta1)  # (numel,) float32
    v = dequantize_moment(moments.codes2, moments.scale2, second) * beta2 + g * g * (1 - beta2)
    root = v.double().sqrt().float()  # rounded to nearest: torch's float32 root on a CPU is often one unit off
    param.copy_(param.float() * decay - m / (root * correction + eps) * size)  # uses m and v before 8 bits round them
    for moment, table, codes, scale in ((m, first, *moments[:2]), (v, second, *moments[2:])):
        new_codes, new_scale = quantize_moment(moment, table)
        codes.copy_(new_codes)
        scale.copy_(new_scale)


def change_8bit(param: torch.Tensor, grad: torch.Tensor, moments: Moments, settings: AdamW) -> None:
    """Do what adamw_8bit does with the fast twin for the device of `param`, if there is one: the same bits, sooner."""
    if kernels := choose(param.device.type).adamw:
        kernels.adamw_8bit(param, grad, *moments, list(tables(param.device)), list(settings.scalars), TINY)
    else:
        adamw_8bit(param, grad, moments, settings)
