"""Double quantization: the constants are quantised too, from 32 bits to 8, in groups of 256.

In: absmax, (n_blocks,) float32. Out: absmax_codes (n_blocks,) uint8, absmax_scale (n_groups,) float32, and
absmax_offset () float32, the mean, which is taken off first because maxima are all positive.
Source: QLoRA section 3, "Double Quantization". At block size 64 a constant costs 32/64 = 0.5 bits per weight before and
8/64 + 32/(64 * 256) = 0.127 after.

The paper says "FP8"; the authors' code uses neither E4M3 nor E5M2 but the dynamic 8-bit type of dynamic_map(), which
spends few bits on the fraction of small numbers and many on that of large ones (Dettmers, arXiv 1511.04561).

But: bitsandbytes' CPU path finds the 8-bit code through a table of 65,536 entries and misses the nearest one for about
2 codes in 1,000; here every code is the nearest. Reading its checkpoints is exact either way.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from qlora_lab.quant.blocks import block_absmax, scale_blocks, to_blocks
from qlora_lab.quant.codebook import nearest_codes

GROUP_SIZE = 256


@dataclass(frozen=True)
class DoubleQuantized:
    """Constants of constants. See the module docstring for shapes."""

    absmax_codes: torch.Tensor
    absmax_scale: torch.Tensor
    absmax_offset: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.absmax_codes.nbytes + self.absmax_scale.nbytes + self.absmax_offset.nbytes


@lru_cache
def _dynamic_map() -> torch.Tensor:
    positive = []
    for i in range(7):  # 7 decades: 10^-6 to 10^0; decade i has 2^i values, the middles of equal steps from 0.1 to 1
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        positive += (10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    return torch.tensor([-p for p in positive] + [0.0, 1.0] + positive).sort().values


def dynamic_map() -> torch.Tensor:
    """The signed dynamic 8-bit table: (256,) float32 ascending; 127 negative values, 0, 128 positive, no -1.

    >>> dynamic_map()[[0, 127, 255]].tolist()
    [-0.992968738079071, 0.0, 1.0]
    """
    return _dynamic_map().clone()


def double_quantize(absmax: torch.Tensor) -> DoubleQuantized:
    """Quantise block constants, (n_blocks,) float32, to 8-bit codes with one float32 scale per 256 of them.

    Raises ValueError for a constant that is not finite: it would spoil the mean, and so every other block.
    """
    if not torch.isfinite(absmax).all():
        block = int((~torch.isfinite(absmax)).nonzero()[0])
        raise ValueError(
            f"block {block} has no finite constant, and double quantization would spread that to all blocks: "
            "repair the weight, or use double_quant=False"
        )
    offset = absmax.mean()
    centred = absmax - offset
    groups = to_blocks(centred, GROUP_SIZE)  # (n_groups, 256): the same scheme once more
    scale = block_absmax(groups)  # (n_groups,)
    codes = nearest_codes(scale_blocks(groups, scale), dynamic_map().to(absmax.device))
    return DoubleQuantized(codes.view(-1)[: len(absmax)].clone(), scale, offset)


def double_dequantize(constants: DoubleQuantized) -> torch.Tensor:
    """The inverse, to within 8-bit rounding: absmax, (n_blocks,) float32."""
    codes, scale = constants.absmax_codes, constants.absmax_scale
    values = dynamic_map().to(codes.device)[codes.int()]  # (n_blocks,)
    return values * scale.repeat_interleave(GROUP_SIZE)[: len(codes)] + constants.absmax_offset
