"""Products in int8: x and the levels of W are rounded to whole numbers, and only their sums are scaled.

In: x (tokens, in_features) float32, and W as a QuantizedTensor. Out: x W^T, (tokens, out_features) float32, which errs
by about 1 % of its size. The fast twins add up the same whole numbers: kernels/int8_products.py for a prompt,
kernels/decode_int8.py for a token of an answer.

    32 columns of x, of one token  ~  s n,                     s = max |x| / 127,  n = round(x / s)
    the same columns of a row of W  =  absmax levels[codes]
                                   ~  absmax unit m,           m = round(levels[codes] / unit)
    x W^T  ~  sum over these blocks of  (s absmax unit) (n m^T)

n and m are whole numbers from -127 to 127. One instruction multiplies and adds 64 pairs of them, where float32 has 16.
The levels of NF4 are not multiples of one unit, so m errs as well: by 0.4 % of absmax at most, and NF4 itself by up to
15 %. Source: LLM.int8() (arXiv 2208.07339), section 2, absmax quantization, here for each block of columns. llama.cpp
rounds activations in blocks of 32, too.

Attention is not part of this: it stays in float32, except that a prompt's kernel may round what it multiplies to bf16
(kernels/prompt_pairs.py).
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from qlora_lab.infer.stack import Product, Stack
from qlora_lab.model import product_4bit
from qlora_lab.quant.quantize import QuantizedTensor

TOP = 127  # -128 has no counterpart
TINY = 1e-30  # an absmax below it counts as this: its reciprocal has to be finite
BLOCK = 32  # columns of x with one scale, as in llama.cpp: with 64, logits err by a quarter more


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
    """Return the levels as whole numbers from -127 to 127, (n_levels,) float32, and what 1 of them stands for.

    The largest becomes the number, 64 at least, that lets all of them err least: 112 for NF4, 120 for FP4 as
    bitsandbytes has it, and a multiple of 8 for int4, which then has no error.
    """
    return _rounded_levels(tuple(levels.tolist()))


@lru_cache  # asked for each product
def _rounded_levels(levels: tuple[float, ...]) -> tuple[torch.Tensor, float]:
    exact = torch.tensor(levels, dtype=torch.float64)
    top = exact.abs().max()
    tops = torch.arange(64, TOP + 1)[:, None]  # (candidates, 1)
    wanted = exact / top * tops  # (candidates, n_levels)
    errors = ((wanted.round() - wanted) / tops).square().sum(1)
    best = int(errors.argmin())
    return wanted[best].round().float(), (top / tops[best]).item()


def forward(x: torch.Tensor, weight: QuantizedTensor) -> torch.Tensor:
    """Return x W^T, (tokens, out_features) float32, for a weight that can_multiply takes."""
    from qlora_lab.kernels import int8_products, prompt_rows

    rows, columns = weight.shape
    levels, unit = round_levels(weight.levels)
    if product_4bit.product_of(weight) and int8_products.can_multiply(rows):
        room = prompt_rows.Room(len(x))
        rounded = prompt_rows.as_they_are(x.contiguous(), room, frozenset({"numbers"})).numbers
        out = room.out(rows)
        int8_products.multiply(rounded, weight.plain, weight.shape, levels, unit, out)
        return out[: len(x)]
    numbers, scales = round_blocks(x, BLOCK)
    blocks = columns // BLOCK
    whole = levels[weight.codes.long()].view(rows, blocks, BLOCK)
    absmax = weight.absmax.repeat_interleave(weight.block_size // BLOCK).view(rows, blocks) * unit
    total = x.new_zeros(len(x), rows)  # (tokens, rows)
    for b in range(blocks):
        sums = numbers[:, b] @ whole[:, b].t()  # (tokens, rows): whole numbers below 2^24, so float32 is exact
        total += sums * absmax[:, b] * scales[:, b, None]
    return total


def can_multiply(part: Product) -> bool:
    """Whether `forward` takes the weight: 4-bit codes, in blocks of a multiple of 32 that end with the rows."""
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
            "int8 needs 4-bit weights, in blocks of a multiple of 32 that end with the rows, and no layer has them: "
            "quantise with block_size=64, or leave the option out"
        )
    return stack._replace(layers=tuple(layers))
