"""What 8 bits do to block constants: any table, any group size, with the mean taken off first or not.

In: absmax, (n_blocks,) float32. Out: the constants as they come back, and the squared error of a weight with them.
Source: QLoRA section 3, "Double Quantization". "dynamic" is what its code stores, "int8" what torchao does; the paper's
word is "FP8", and torch has the two types that are called so elsewhere, E4M3 and E5M2.

Not here: the stored form (quant/double_quant.py), which the table "dynamic" with groups of 256 and the mean equals.
"""

from dataclasses import replace

import torch

from qlora_lab.quant.blocks import block_absmax, scale_blocks, to_blocks
from qlora_lab.quant.codebook import integer_levels, nearest_codes
from qlora_lab.quant.double_quant import GROUP_SIZE, dynamic_map
from qlora_lab.quant.quantize import QuantizedTensor, dequantize


def _finite(dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()]  # E4M3 has 254 such values, E5M2 248
    return values / values.max()


_TABLES = {
    "dynamic": dynamic_map,
    "int8": lambda: integer_levels(8),
    "e4m3": lambda: _finite(torch.float8_e4m3fn),
    "e5m2": lambda: _finite(torch.float8_e5m2),
}
TABLES = tuple(_TABLES)


def constants_table(name: str) -> torch.Tensor:
    """A table of 8 bits by name, (at most 256,) float32, the largest value 1. ValueError for a name not in TABLES.

    >>> len(constants_table("e4m3"))
    254
    """
    if name not in _TABLES:
        raise ValueError(f"table {name!r} is not known: choose one of {', '.join(TABLES)}")
    return _TABLES[name]()


def stored_constants(
    absmax: torch.Tensor, table: str = "dynamic", group_size: int = GROUP_SIZE, mean_offset: bool = True
) -> torch.Tensor:
    """absmax, (n_blocks,) float32, after 8 bits and back: groups of `group_size` share one float32 scale.

    >>> [round(c, 4) for c in stored_constants(torch.tensor([1.0, 1, 1, 2]), "int8").tolist()]  # 1.25 - 0.75 * 42/127
    [1.002, 1.002, 1.002, 2.0]
    """
    levels = constants_table(table)
    offset = absmax.mean() if mean_offset else torch.zeros(())
    groups = to_blocks(absmax - offset, group_size)  # (n_groups, group_size)
    scale = block_absmax(groups)  # (n_groups,)
    codes = nearest_codes(scale_blocks(groups, scale), levels)
    values = levels[codes.int()] * scale[:, None]
    return values.view(-1)[: len(absmax)] + offset  # (n_blocks,)


def squared_error(weight: torch.Tensor, q: QuantizedTensor, absmax: torch.Tensor | None = None) -> float:
    """Sum of squares between `weight` and `q`, read with other constants where `absmax`, (n_blocks,) float32, is given.

    >>> from qlora_lab.quant.quantize import quantize
    >>> q = quantize(torch.ones(64))
    >>> squared_error(torch.ones(64), q), squared_error(torch.ones(64), q, torch.tensor([0.5]))
    (0.0, 16.0)
    """
    q = q if absmax is None else replace(q, constants=absmax)
    return (dequantize(q, torch.float32) - weight).square().sum().item()
