"""Quantise and dequantise: codebook, blocks, packing and double quantization put together.

In: a weight of any shape, float32, bf16 or fp16. Out: a QuantizedTensor, and back to a weight.
Source: QLoRA section 3. Bytes and float32 values equal those of bitsandbytes 0.50; tests/quant/test_bitsandbytes.py
lists the legitimate differences.

The whole of it, for one block, is
    absmax = max |w|;   code = nearest(w / absmax, levels);   w' = levels[code] * absmax.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import lcm
from typing import Self

import torch

from qlora_lab.kernels.packed_weight import PackedWeight
from qlora_lab.quant.blocks import TINY, block_absmax, check_block_size, scale_blocks, to_blocks
from qlora_lab.quant.codebook import (
    CUSTOM,
    bits_of,
    check_levels,
    codebook as named_codebook,
    nearest_codes,
    rounding,
    zero_code,
)
from qlora_lab.quant.double_quant import DoubleQuantized, double_dequantize, double_quantize
from qlora_lab.quant.packing import group_of, pack, unpack

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PIECE = 2**20  # weights quantised at a time: temporaries stay in cache, and peak memory stays near the result's size


@dataclass(frozen=True, eq=False)  # equal only if identical: == on tensors has no single answer
class Quantized:
    """Plain tensors and what is needed to read them. Nothing in it ever changes. A stack's parts have n in front."""

    packed: torch.Tensor  # (ceil(numel * bits / 8),) uint8, first code in the high bits, in whole groups (packing.py)
    constants: torch.Tensor | DoubleQuantized  # absmax, (n_blocks,) float32, or its quantised form
    levels: torch.Tensor  # (at most 2^bits,) float32, what each code stands for
    codebook: str  # the name of the levels, "custom" for a table made by hand
    block_size: int  # weights per constant
    shape: torch.Size  # of the original weight
    dtype: torch.dtype  # of the original weight

    @property
    def double_quant(self) -> bool:
        """Whether the constants are quantised as well."""
        return isinstance(self.constants, DoubleQuantized)

    def __getstate__(self) -> dict:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # a copy caches its own

    @property
    def bits(self) -> int:
        """Bits per code."""
        return bits_of(self.levels)

    @property
    def numel(self) -> int:
        """Number of weights (not of bytes)."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of codes and constants. The levels are not counted: all tensors of a model share them."""
        return self.packed.nbytes + self.constants.nbytes

    @property
    def bits_per_parameter(self) -> float:
        """Bits stored per weight: 4.5 for NF4 at block size 64, about 4.127 with double quantization."""
        return 8 * self.nbytes / self.numel

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def to(self, device: torch.device | str) -> Self:
        """The same weight on another device."""
        constants = self.constants.to(device)
        return replace(self, packed=self.packed.to(device), constants=constants, levels=self.levels.to(device))

    def __repr__(self) -> str:
        double = ", double_quant" if self.double_quant else ""
        return (
            f"{type(self).__name__}({self.codebook}, shape={tuple(self.shape)}, block_size={self.block_size}{double}, "
            f"{self.nbytes:,} bytes, {self.bits_per_parameter:.3f} bits per parameter)"
        )


class QuantizedTensor(Quantized):
    """A quantised weight. Several of one shape make a QuantizedStack (stack.py)."""

    @property
    def absmax(self) -> torch.Tensor:
        """Block constants, (n_blocks,) float32, with double quantization undone."""
        return double_dequantize(self.constants) if self.double_quant else self.constants

    @cached_property
    def plain(self) -> PackedWeight:
        """The tensors as kernels take them; made once per QuantizedTensor, because kernels cache in it."""
        constants = self.constants.plain if self.double_quant else self.constants
        return PackedWeight(self.packed, constants, self.levels, self.block_size)

    @property
    def codes(self) -> torch.Tensor:
        """One code per weight, (numel,) uint8."""
        return unpack(self.packed, self.numel, self.bits)


def quantize(
    weight: torch.Tensor,
    codebook: str | torch.Tensor = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    *,
    name: str = "weight",
    keep_non_finite: bool = False,
) -> QuantizedTensor:
    """Quantise `weight`, any shape with at least one element, float32, bf16 or fp16, block by block.

    codebook: a name that qlora_lab.codebook takes, or levels of your own (see codebook.check_levels).
    block_size: 16 to 4096 weights per constant. double_quant: quantise the constants too.
    name: what errors call this tensor. keep_non_finite: accept NaN and infinity; the block of such a value, and no
    other, then dequantises to NaN. By default such a value is an error; with double_quant, whose constants share a
    mean, it always is. Raises TypeError for other dtypes, ValueError for anything else that is not allowed.

    >>> q = quantize(torch.linspace(-1, 1, 128), "nf4", block_size=64)
    >>> q.bits_per_parameter, q.codes[[0, 127]].tolist()
    (4.5, [0, 15])
    """
    from qlora_lab.kernels import blocks_for

    _check_weight(weight, name)
    named = isinstance(codebook, str)  # else a table of the caller's
    levels = (named_codebook(codebook) if named else check_levels(codebook)).to(weight.device)
    check_block_size(block_size)
    flat = weight.detach().reshape(-1).contiguous()  # (numel,); reshape alone can leave gaps
    if kernels := blocks_for(weight.device.type, len(levels), block_size):
        group = group_of(bits_of(levels))[0]
        packed, absmax = kernels.quantize_blocks(flat, *rounding(levels), block_size, group, TINY)
    else:
        packed, absmax = quantize_blocks(flat, levels, block_size)
    if not keep_non_finite or double_quant:
        _check_finite(absmax, weight, name)
    return QuantizedTensor(
        packed=packed,
        constants=double_quantize(absmax) if double_quant else absmax,
        levels=levels,
        codebook=codebook if named else CUSTOM,
        block_size=block_size,
        shape=weight.shape,
        dtype=weight.dtype,
    )


def quantize_blocks(weight: torch.Tensor, levels: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(numel,) weights -> packed, uint8, and absmax, (n_blocks,) float32, NaN for a block that is not finite."""
    fill = zero_code(levels)  # a padded weight dequantises to 0
    packed = []
    absmax = []
    for piece in weight.split(_piece_length(block_size, bits_of(levels))):
        blocks = to_blocks(piece, block_size)  # (n_blocks, block_size)
        constants = block_absmax(blocks)
        constants = constants.where(constants.isfinite(), torch.nan)  # infinity would turn zeros alone into NaN
        codes = nearest_codes(scale_blocks(blocks, constants), levels).view(-1)[: len(piece)]
        packed.append(pack(codes, bits_of(levels), fill))
        absmax.append(constants)
    return torch.cat(packed), torch.cat(absmax)


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return the weight that `q` stands for, of shape `q.shape`: float32 products, rounded once to `dtype`.

    dtype: float32, bf16 or fp16; None takes that of the original weight. out: a contiguous tensor of `q.numel` elements
    to fill instead of a new one; its dtype then decides.
    Raises TypeError for another dtype, ValueError for an `out` of another size or layout.

    >>> dequantize(quantize(torch.linspace(-1, 1, 64)))[[0, 63]].tolist()
    [-1.0, 1.0]
    """
    from qlora_lab.kernels import blocks_for

    out = _output(q, dtype, out)
    if kernels := blocks_for(q.device.type, len(q.levels), q.block_size):
        kernels.dequantize_blocks(q.plain, out)
    else:
        dequantize_blocks(q.packed, q.absmax, q.levels, q.block_size, out.view(-1))
    return out if out.shape == q.shape else out.view(q.shape)


def dequantize_blocks(
    packed: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor, block_size: int, out: torch.Tensor
) -> None:
    """Fill `out`, (numel,) float32, bf16 or fp16, with levels[code] * absmax of the block."""
    bits = bits_of(levels)
    n_codes, n_bytes = group_of(bits)
    step = _piece_length(block_size, bits)  # a piece at a time, as in quantize_blocks
    for start in range(0, len(out), step):
        stop = min(start + step, len(out))
        some = packed[start // n_codes * n_bytes : -(-stop // n_codes) * n_bytes]  # whole groups of codes
        values = levels.index_select(0, unpack(some, stop - start, bits).int())  # (stop - start,) float32
        blocks = to_blocks(values, block_size)  # (n_blocks, block_size), a view of values where it can be
        blocks *= absmax[start // block_size : start // block_size + len(blocks), None]
        out[start:stop] = blocks.view(-1)[: stop - start]


def _piece_length(block_size: int, bits: int) -> int:
    unit = lcm(block_size, group_of(bits)[0])  # a piece ends where a block and a whole group of codes end
    return max(1, PIECE // unit) * unit


def _output(q: QuantizedTensor, dtype: torch.dtype | None, out: torch.Tensor | None) -> torch.Tensor:
    dtype = (dtype or q.dtype) if out is None else out.dtype
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"dtype {dtype} is not supported: weights are {_names(WEIGHT_DTYPES)}")
    if out is None:
        return torch.empty(q.shape, dtype=dtype, device=q.device)
    if out.device != q.device:
        raise ValueError(f"out is on {out.device}, but the quantised weight on {q.device}: move one of them with .to()")
    if out.numel() != q.numel or not out.is_contiguous():
        layout = "contiguous" if out.is_contiguous() else "not contiguous"
        raise ValueError(f"out has {out.numel()} elements and is {layout}: it needs {q.numel}, contiguous")
    return out


def _check_weight(weight: torch.Tensor, name: str) -> None:
    if not isinstance(weight, torch.Tensor) or weight.dtype not in WEIGHT_DTYPES:
        kind = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise TypeError(f"{name} is {kind}: it must be a tensor of {_names(WEIGHT_DTYPES)}")
    if not weight.numel():
        raise ValueError(f"{name} has shape {tuple(weight.shape)}, so there is nothing to quantise")


def _check_finite(absmax: torch.Tensor, weight: torch.Tensor, name: str) -> None:
    if not absmax.sum().isnan():  # one pass over the constants, not over the weights
        return
    index = tuple((~torch.isfinite(weight)).nonzero()[0].tolist())
    raise ValueError(
        f"{name} holds {weight[index].item()} at index {index}: repair it (for example with torch.nan_to_num), "
        "or pass keep_non_finite=True, without double_quant, to let it turn its block into NaN"
    )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)
