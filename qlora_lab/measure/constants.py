"""Store block constants in 8 bits: with any table, any group size, with or without the mean subtracted first.

Source: QLoRA section 3, "Double Quantization". Its code stores "dynamic", torchao stores "int8". The paper says "FP8",
which elsewhere names torch's two types E4M3 and E5M2.

Not here: the stored form (quant/double_quant.py), equal to the table "dynamic" with groups of 256 and the mean.
"""

from dataclasses import replace

import torch

from qlora_lab.quant.blocks import block_absmax, scale_blocks, to_blocks
from qlora_lab.quant.codebook import integer_levels, nearest_codes
from qlora_lab.quant.double_quant import GROUP_SIZE, dynamic_map
from qlora_lab.quant.quantize import QuantizedTensor, dequantize


def _finite(dtype: torch.dtype) -> torch.Tensor:
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()  # every bit pattern once
    values = values[values.isfinite()]  # 254 of E4M3, 248 of E5M2
    return values / values.max()


_TABLES = {
    "dynamic": dynamic_map,
    "int8": lambda: integer_levels(8),
    "e4m3": lambda: _finite(torch.float8_e4m3fn),
    "e5m2": lambda: _finite(torch.float8_e5m2),
}
TABLES = tuple(_TABLES)


def constants_table(name: str) -> torch.Tensor:
    """Return a table of 8 bits by name, (at most 256,) float32, its largest value 1. ValueError if not in TABLES."""
    if name not in _TABLES:
        raise ValueError(f"table {name!r} is not known: choose one of {', '.join(TABLES)}")
    return _TABLES[name]()


def stored_constants(
    absmax: torch.Tensor, table: str = "dynamic", group_size: int = GROUP_SIZE, mean_offset: bool = True
) -> torch.Tensor:
    """Round absmax, (n_blocks,) float32, to 8 bits and back: groups of `group_size` share one float32 scale.

    >>> [round(c, 4) for c in stored_constants(torch.tensor([1.0, 1, 1, 2]), "int8").tolist()]  # 1.25 - 0.75 * 42/127
    [1.002, 1.002, 1.002, 2.0]
    """
    levels = constants_table(table)
    offset = absmax.mean() if mean_offset else torch.zeros((), dtype=torch.float32)
    groups = to_blocks(absmax - offset, group_size)  # (n_groups, group_size)
    scale = block_absmax(groups)  # (n_groups,)
    codes = nearest_codes(scale_blocks(groups, scale), levels)  # (n_groups, group_size)
    values = levels[codes.int()] * scale[:, None]
    return values.view(-1)[: len(absmax)] + offset  # (n_blocks,), without the padding of the last group


def squared_error(weight: torch.Tensor, q: QuantizedTensor, absmax: torch.Tensor | None = None) -> float:
    """Sum the squared differences of `weight` and `q`. absmax, (n_blocks,) float32, replaces the constants of `q`.

    >>> from qlora_lab.quant.quantize import quantize
    >>> q = quantize(torch.ones(64))
    >>> squared_error(torch.ones(64), q), squared_error(torch.ones(64), q, torch.tensor([0.5]))
    (0.0, 16.0)
    """
    q = q if absmax is None else replace(q, constants=absmax)
    return (dequantize(q, torch.float32) - weight).square().sum().item()
