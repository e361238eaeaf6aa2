"""One step of AdamW with both moments kept as 8-bit codes, in blocks of 256 with one float32 constant each.

In: flat parameters and gradients, (numel,) float32, bf16 or fp16; moments as codes, (numel,) uint8, and constants,
(ceil(numel / 256),) float32. All but the gradient are changed in place.
Source: "8-bit Optimizers via Block-wise Quantization" (2021), sections 2 and 3; "Decoupled Weight Decay
Regularization", algorithm 2. The first moment takes the signed dynamic table, the second the unsigned one.

A moment is quantised as a weight is: absmax, code of the nearest level. What is new is that it is done at every step.

Not here: pages; kernels, which adamw_8bit's callers get from change_8bit (kernels/adamw.py, triton/adamw_8bit.py).
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from qlora_lab.kernels import choose
from qlora_lab.quant.blocks import TINY, block_absmax, scale_blocks, to_blocks
from qlora_lab.quant.codebook import midpoints, nearest_codes
from qlora_lab.quant.double_quant import dynamic_map

BLOCK = 256  # values that share a constant, as in bitsandbytes


@dataclass(frozen=True)
class AdamW:
    """What a step depends on besides its tensors. step counts from 1."""

    step: int
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self):
        if self.step < 1:
            raise ValueError(f"step={self.step} is not allowed: the first step is 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not allowed: it is at least 0 and less than 1")

    @property
    def scalars(self) -> tuple[float, ...]:
        """beta1, beta2, what is left of a parameter, the step size, 1 / sqrt(1 - beta2^step), eps."""
        decay, size = 1 - self.lr * self.weight_decay, self.lr / (1 - self.beta1**self.step)
        return self.beta1, self.beta2, decay, size, (1 - self.beta2**self.step) ** -0.5, self.eps


@lru_cache
def tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels (256,) and thresholds (255,) of the first moment, then of the second; not to be changed."""
    with torch.inference_mode(False):  # what is made inside could not be used outside
        maps = dynamic_map().to(device), dynamic_map(signed=False).to(device)
        return maps[0], midpoints(maps[0]), maps[1], midpoints(maps[1])


def dequantize_moment(codes: torch.Tensor, scale: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """(numel,) uint8 codes -> (numel,) float32."""
    return table[codes.int()] * scale.repeat_interleave(BLOCK)[: len(codes)]


def quantize_moment(values: torch.Tensor, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(numel,) float32 -> codes (numel,) uint8, and constants (ceil(numel / 256),) float32."""
    blocks = to_blocks(values, BLOCK)  # (n_blocks, 256)
    scale = block_absmax(blocks)
    scale = scale.where(scale.isfinite(), torch.nan)  # as for a weight: the whole block is lost, and no other
    return nearest_codes(scale_blocks(blocks, scale), table).view(-1)[: len(values)], scale


def adamw_8bit(
    param: torch.Tensor,
    grad: torch.Tensor,
    codes1: torch.Tensor,
    scale1: torch.Tensor,
    codes2: torch.Tensor,
    scale2: torch.Tensor,
    how: AdamW,
) -> None:
    """Change param, codes1, scale1, codes2, scale2 in place.

    >>> state = [torch.zeros(1, dtype=dtype) for dtype in (torch.uint8, torch.float32) * 2]
    >>> p = torch.ones(1); adamw_8bit(p, torch.ones(1), *state, AdamW(step=1, lr=0.1)); round(p.item(), 4)
    0.9
    """
    beta1, beta2, decay, size, correction, eps = how.scalars
    first, _, second, _ = tables(param.device)
    g = grad.float()
    m = dequantize_moment(codes1, scale1, first) * beta1 + g * (1 - beta1)
    v = dequantize_moment(codes2, scale2, second) * beta2 + g * g * (1 - beta2)
    root = v.double().sqrt().float()  # the nearest: torch's float32 root on a CPU is often one step off
    param.copy_(param.float() * decay - m / (root * correction + eps) * size)
    for moment, table, codes, scale in ((m, first, codes1, scale1), (v, second, codes2, scale2)):
        new_codes, new_scale = quantize_moment(moment, table)
        codes.copy_(new_codes)
        scale.copy_(new_scale)


def change_8bit(
    param: torch.Tensor,
    grad: torch.Tensor,
    codes1: torch.Tensor,
    scale1: torch.Tensor,
    codes2: torch.Tensor,
    scale2: torch.Tensor,
    how: AdamW,
) -> None:
    """adamw_8bit, by the kernel that kernels.choose has for the device of `param`, if any: the same bits, faster."""
    state = codes1, scale1, codes2, scale2
    if kernels := choose(param.device.type).adamw:
        kernels.adamw_8bit(param, grad, *state, list(tables(param.device)), list(how.scalars), TINY)
    else:
        adamw_8bit(param, grad, *state, how)
