"""Continue from what a cache has read: a conversation's next question then costs its own tokens, not all of them.

In: the cache of an earlier answer with its tokens, and new texts. Out: a new cache that begins with the keys and values
of the longest common prefix. A template may render earlier turns differently; then the prefix ends there.

Keys and values belong to weights, and weights can change in between (training, an adapter that is put on). So all of
them are compared by a CRC of their bytes: the time of a few tokens, whatever the prompt's length.
"""

import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from qlora_lab.infer.cache import Cache
from qlora_lab.infer.stack import Stack
from qlora_lab.quant.quantize import QuantizedTensor


class Prefix(NamedTuple):
    """Tokens whose keys and values stand in `cache`, in each row from position 0 on."""

    ids: list[list[int]]
    cache: Cache
    weights: tuple  # of the stack that read them, from weights_of, and whether they computed in int8


def weights_of(stack: Stack) -> tuple:
    """Return what tells one stack from another: its numbers, and of its tensors shape, dtype and CRC-32.

    One changed weight changes a CRC for certain, and any other change does so but once in 2^32.
    """
    tensors: dict[tuple, tuple[int, torch.Tensor]] = {}  # by address: a head may be the embedding
    marks = _marks(stack._replace(rotary=None), tensors)
    found = [tensor for _, tensor in tensors.values()]
    threads = torch.get_num_threads()  # zlib works outside Python's lock; each takes many tensors, most are small
    with ThreadPoolExecutor(threads) as pool:
        return marks, tuple(pool.map(_crcs, (found[i::threads] for i in range(threads))))


def take_over(prefix: Prefix, rows: list[list[int]], weights: tuple, cache: Cache) -> None:
    """Copy into the empty `cache` what `prefix` has read of each of `rows`, if the weights are the same.

    Tokens from the first different one on have to be read.
    """
    old = prefix.cache
    # a cache of other bits holds other numbers, and other rows are other texts
    if weights != prefix.weights or len(rows) != len(prefix.ids) or cache.keys.dtype != old.keys.dtype:
        return
    for row, (new, read) in enumerate(zip(rows, prefix.ids, strict=True)):
        n = _common(new, read)
        # other angles would turn a key of the same token in another way
        if torch.equal(cache.cos[:n], old.cos[:n]) and torch.equal(cache.sin[:n], old.sin[:n]):
            for part, known in zip(cache.kept, old.kept, strict=True):
                part[:, row, :, :n] = known[:, row, :, :n]
            cache.lengths[row] = n


def _common(new: list[int], known: list[int]) -> int:
    pairs = zip(new, known, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(new), len(known)))


def _marks(value, tensors: dict[tuple, tuple[int, torch.Tensor]]):
    """Return `value` with shape, dtype and number in place of each tensor, which `tensors` collects."""
    if isinstance(value, torch.Tensor):
        number, _ = tensors.setdefault((value.data_ptr(), value.shape, value.stride()), (len(tensors), value))
        return tuple(value.shape), value.dtype, number
    if isinstance(value, QuantizedTensor):
        constants = value.constants if isinstance(value.constants, torch.Tensor) else tuple(value.constants.plain)
        return _marks((value.packed, constants, value.levels, value.block_size, tuple(value.shape)), tensors)
    return tuple(_marks(part, tensors) for part in value) if isinstance(value, tuple) else value


def _crcs(tensors: list[torch.Tensor]) -> tuple[int, ...]:
    return tuple(zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy()) for tensor in tensors)
