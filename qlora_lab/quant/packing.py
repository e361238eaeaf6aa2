"""Packing: codes of k bits become bytes, one stream of bits with the first code in the highest bits.

In: codes, (n,) uint8 below 2^bits. Out: packed, (ceil(n * bits / 8),) uint8, rounded up to whole groups.
At 4 bits this is the nibble order of bitsandbytes and torchao: byte = first << 4 | second.

The smallest group of codes that fills whole bytes is the unit: 2 codes in 1 byte at 4 bits, 4 in 1 at 2 bits,
8 in 3 at 3 bits. A last group that is not full is padded with `fill`, the code of zero.
"""

from math import lcm

import torch


def group_of(bits: int) -> tuple[int, int]:
    """Return the smallest number of codes that fill whole bytes, and how many bytes they fill."""
    return lcm(bits, 8) // bits, lcm(bits, 8) // 8


def pack(codes: torch.Tensor, bits: int = 4, fill: int = 0) -> torch.Tensor:
    """(n,) uint8 codes -> uint8 bytes, first code in the high bits; the last group is padded with code `fill`.

    Raises ValueError for a code that does not fit into `bits` bits.

    >>> [hex(b) for b in pack(torch.tensor([15, 0, 7], dtype=torch.uint8), fill=7).tolist()]
    ['0xf0', '0x77']
    """
    if codes.dtype != torch.uint8:
        raise TypeError(f"codes are {codes.dtype}, but packing takes torch.uint8: convert them with .to(torch.uint8)")
    if len(codes) and int(codes.max()) >= 2**bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits: codes go from 0 to {2**bits - 1}")
    n_codes, n_bytes = group_of(bits)
    codes = torch.nn.functional.pad(codes, (0, -len(codes) % n_codes), value=fill)
    groups = codes.view(-1, n_codes)  # (n_groups, n_codes)
    word = groups[:, 0].to(_word_dtype(n_bytes))  # (n_groups,)
    for i in range(1, n_codes):
        word = word << bits | groups[:, i]  # the first code ends up highest
    columns = [word >> 8 * i & 0xFF for i in reversed(range(n_bytes))]
    return torch.stack(columns, dim=1).to(torch.uint8).view(-1)  # (n_groups * n_bytes,)


def unpack(packed: torch.Tensor, numel: int, bits: int = 4) -> torch.Tensor:
    """The inverse of pack: uint8 bytes -> the first `numel` codes, (numel,) uint8."""
    n_codes, n_bytes = group_of(bits)
    groups = packed.view(-1, n_bytes)  # (n_groups, n_bytes)
    word = groups[:, 0].to(_word_dtype(n_bytes))  # (n_groups,)
    for i in range(1, n_bytes):
        word = word << 8 | groups[:, i]
    shifts = [bits * i for i in reversed(range(n_codes))]  # the first code lies highest
    codes = torch.stack([(word >> s & (2**bits - 1)).to(torch.uint8) for s in shifts], dim=1)  # (n_groups, n_codes)
    return codes.view(-1)[:numel]  # without the padding


def _word_dtype(n_bytes: int) -> torch.dtype:
    return torch.uint8 if n_bytes == 1 else torch.int64  # 7-bit codes need 56 bits; one byte needs no wider word
