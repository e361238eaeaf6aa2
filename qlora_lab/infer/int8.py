"""Products of a prompt in int8: x and the levels of W are rounded to whole numbers, and only their sums are scaled.

In: x (tokens, in_features) float32, and W as a QuantizedTensor. Out: x W^T, (tokens, out_features) float32, which errs
by about 1 % of its size. kernels/int8_products.py is the fast twin: it adds up the same whole numbers.

    a block of x, of one token      ~  s n,               s = max |x| / 127,       n = round(x / s)
    the same block of a row of W    =  absmax levels[codes]
                                    ~  absmax / 127 m,    m = round(127 levels[codes])
    x W^T  ~  sum over blocks of  (s absmax / 127) (n m^T)

n and m are whole numbers from -127 to 127. One instruction multiplies and adds 64 pairs of them, where float32 has 16.
The levels of NF4 are no multiples of 1/127, so m errs as well: by 1/254 of absmax at most, and NF4 itself by up to
1/6.6 of it. Source: absmax rounding to int8 is equation 1 of LLM.int8() (arXiv 2208.07339), here for each block of
columns. llama.cpp rounds activations in blocks, too.
"""

from typing import NamedTuple

import torch

from qlora_lab.infer.stack import Product, Stack
from qlora_lab.model import product_4bit
from qlora_lab.quant.quantize import QuantizedTensor

TOP = 127  # -128 has no counterpart
TINY = 1e-30  # an absmax below it counts as this: its reciprocal has to be finite
BLOCK = 64  # a block of a weight is a multiple of this: one vector register of bytes


class Rounded(NamedTuple):
    """Whole numbers, and a scale for each block of columns."""

    numbers: torch.Tensor  # (tokens, blocks, block_size) float32, -127 to 127
    scales: torch.Tensor  # (tokens, blocks) float32; NaN for a block that holds NaN or infinity


def round_blocks(x: torch.Tensor, block_size: int) -> Rounded:
    """Round x (tokens, columns) float32 to whole numbers from -127 to 127 times a scale for each block of columns.

    >>> numbers, scales = round_blocks(torch.tensor([[0.5, -2.0, 0.3, 0.0]]), 4)
    >>> numbers, scales * 127
    (tensor([[[  32., -127.,   19.,    0.]]]), tensor([[2.]]))
    """
    blocks = x.view(len(x), -1, block_size)  # (tokens, blocks, block_size)
    absmax = blocks.abs().amax(-1)  # (tokens, blocks)
    factors = TOP * absmax.clamp(min=TINY).reciprocal()
    numbers = (blocks * factors[..., None]).round()  # ties to even, as the kernel rounds
    scales = absmax / TOP
    return Rounded(numbers, scales.where(scales.isfinite(), torch.nan))


def round_levels(levels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return the levels as whole numbers from -127 to 127, (n_levels,) float32, and what 1 of them stands for."""
    top = levels.abs().max().item()
    return (levels * (TOP / top)).round(), top / TOP


def forward(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """Return x W^T, (tokens, out_features) float32, for a weight that can_multiply takes."""
    from qlora_lab.kernels import int8_products

    rows, columns = weight.shape
    levels, unit = round_levels(weight.levels)
    if product_4bit.product_of(weight) and int8_products.can_multiply(rows):
        return int8_products.multiply(x, weight.plain, rows, levels, unit)
    numbers, scales = round_blocks(x, weight.block_size)
    blocks = columns // weight.block_size
    whole = levels[weight.codes.long()].view(rows, blocks, -1)  # (rows, blocks, block_size)
    absmax = weight.absmax.view(rows, blocks) * unit
    total = x.new_zeros(len(x), rows)  # (tokens, rows)
    for b in range(blocks):
        # float64, because a block of 4096 has sums above 2^24, up to which float32 holds every whole number
        sums = (numbers[:, b].double() @ whole[:, b].t().double()).float()
        total += sums * absmax[:, b] * scales[:, b, None]
    return total


def can_multiply(part: Product) -> bool:
    """Whether `forward` takes the weight: 4-bit codes, in blocks of a multiple of 64 that end with the rows."""
    weight = part.weight
    if not isinstance(weight, QuantizedTensor) or weight.bits != 4:
        return False
    return weight.block_size % BLOCK == 0 and weight.shape[1] % weight.block_size == 0


def with_int8(stack: Stack) -> Stack:
    """Return the stack with layers that compute in int8 where can_multiply says so; the head stays as it is.

    Adapters stay in float32 beside them. Raises ValueError if no layer can.
    """
    layers = []
    for layer in stack.layers:
        names = (name for name in layer._fields if isinstance(getattr(layer, name), Product))
        parts = {name: getattr(layer, name) for name in names}
        layers.append(layer._replace(**{n: part._replace(int8=can_multiply(part)) for n, part in parts.items()}))
    if not any(part.int8 for layer in layers for part in layer.products):
        raise ValueError(
            "a prompt in int8 needs weights in 4 bits, in blocks of a multiple of 64 that end with the rows, and no "
            "layer has them: quantise with block_size=64, or leave the option out"
        )
    return stack._replace(layers=tuple(layers))
