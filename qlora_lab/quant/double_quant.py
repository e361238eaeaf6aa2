"""Double quantization: the constants are quantised too, from 32 bits to 8, in groups of 256.

In: absmax, (n_blocks,) float32. Out: absmax_codes (n_blocks,) uint8, absmax_scale (n_groups,) float32, and
absmax_offset () float32, their mean. It is subtracted first, because maxima are all positive and half of the 8-bit
table is negative.
Source: QLoRA section 3, "Double Quantization". At block size 64 a constant costs 32/64 = 0.5 bits per weight before and
8/64 + 32/(64 * 256) = 0.127 after.

The paper says "FP8"; the authors' code uses neither E4M3 nor E5M2 but the dynamic 8-bit type of dynamic_map(), which
spends few bits on the fraction of small numbers and many on that of large ones (Dettmers, arXiv 1511.04561).

But: bitsandbytes' CPU path finds the 8-bit code through a table of 65,536 entries, and about 2 codes in 1,000 are not
the nearest; here every code is. Reading its checkpoints is exact either way.
"""

from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from qlora_lab.kernels.packed_weight import PackedConstants, PackedWeight
from qlora_lab.quant.blocks import TINY, block_absmax, scale_blocks, to_blocks
from qlora_lab.quant.codebook import evenly_spaced, nearest_codes, rounding

GROUP_SIZE = 256  # constants that share a float32 scale: 32 / 256 bits for each
MEAN_PIECE = 2**14  # constants that torch adds up in one thread


@dataclass(frozen=True)
class DoubleQuantized:
    absmax_codes: torch.Tensor  # (n_blocks,) uint8
    absmax_scale: torch.Tensor  # (n_groups,) float32
    absmax_offset: torch.Tensor  # () float32

    @property
    def plain(self) -> PackedConstants:
        table = _map_on(self.absmax_codes.device)
        return PackedConstants(self.absmax_codes, self.absmax_scale, self.absmax_offset, table, GROUP_SIZE)

    def to(self, device: torch.device | str) -> "DoubleQuantized":
        parts = self.absmax_codes, self.absmax_scale, self.absmax_offset
        return DoubleQuantized(*(part.to(device) for part in parts))

    @property
    def nbytes(self) -> int:
        return self.absmax_codes.nbytes + self.absmax_scale.nbytes + self.absmax_offset.nbytes


@lru_cache
@torch.inference_mode(False)
def _dynamic_map(signed: bool = True) -> torch.Tensor:
    positive = []
    for i in range(7):  # 7 decades up to 10^0; decade i has 2^i values, the middles of equal steps
        edges = evenly_spaced(0.1, 1, 2 ** (i + (not signed)) + 1)
        positive += (10.0 ** (i - 6) * (edges[:-1] + edges[1:]) / 2).tolist()
    negative = [-p for p in positive] if signed else []  # the same values below 0
    return torch.tensor(negative + [0.0, 1.0] + positive, dtype=torch.float32).sort().values  # (256,)


@lru_cache
def _map_on(device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # autograd cannot save a table made in inference mode
        return _dynamic_map().to(device)


def dynamic_map(signed: bool = True) -> torch.Tensor:
    """Return the dynamic 8-bit table: (256,) float32 ascending; 127 negative values, 0, 128 positive, no -1.

    Unsigned: 0 and 255 positive values, twice as many per decade, for numbers that are never negative.
    """
    return _dynamic_map(signed).clone()


def double_quantize(absmax: torch.Tensor) -> DoubleQuantized:
    """Quantise block constants, (n_blocks,) float32, to 8-bit codes with one float32 scale per 256 of them.

    Raises ValueError for a constant that is not finite: it would spoil the mean, and so every other block.
    """
    absmax = absmax.float()
    offset = _mean(absmax)
    if not torch.isfinite(offset):
        raise ValueError(
            f"{_culprit(absmax)}, and double quantization would spread that to all blocks: "
            "repair the weight, or use double_quant=False"
        )
    centred = absmax - offset
    if kernels := _kernels(absmax):
        tables = rounding(_map_on(absmax.device))
        codes, scale = kernels.quantize_blocks(centred, *tables, GROUP_SIZE, 1, TINY)
        return DoubleQuantized(codes, scale, offset)
    groups = to_blocks(centred, GROUP_SIZE)  # (n_groups, 256): the same scheme once more
    scale = block_absmax(groups)  # (n_groups,)
    codes = nearest_codes(scale_blocks(groups, scale), dynamic_map().to(absmax.device))
    return DoubleQuantized(codes.view(-1)[: len(absmax)].clone(), scale, offset)


def _culprit(absmax: torch.Tensor) -> str:
    bad = (~torch.isfinite(absmax)).nonzero()  # (n_bad, 1)
    if len(bad):
        return f"block {int(bad[0])} has no finite constant"
    return f"the constants, up to {absmax.max().item():.3g}, have no finite mean"


def _mean(absmax: torch.Tensor) -> torch.Tensor:
    """Return the mean, () float32, the same for any number of threads; torch's own, from 32,768 values on, is not."""
    sums = torch.stack([piece.sum() for piece in absmax.split(MEAN_PIECE)])  # (n_pieces,)
    return sums.sum() / len(absmax)


def double_dequantize(constants: DoubleQuantized) -> torch.Tensor:
    """Undo double_quantize, to within 8-bit rounding: absmax, (n_blocks,) float32."""
    codes = constants.absmax_codes
    scale = constants.absmax_scale
    if kernels := _kernels(codes):
        values = torch.empty_like(codes, dtype=torch.float32)  # (n_blocks,)
        kernels.dequantize_blocks(PackedWeight(codes, scale, _map_on(codes.device), GROUP_SIZE), values)
        return values.add_(constants.absmax_offset)
    values = dynamic_map().to(codes.device)[codes.int()]  # (n_blocks,)
    return values * scale.repeat_interleave(GROUP_SIZE)[: len(codes)] + constants.absmax_offset


def _kernels(tensor: torch.Tensor) -> ModuleType | None:
    from qlora_lab.kernels import blocks_for

    return blocks_for(tensor.device.type, 256, GROUP_SIZE)
