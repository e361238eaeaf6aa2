"""Continue from what a cache has read: a conversation's next question then costs its own tokens, not all of them.

In: the cache of an earlier answer with its tokens, and new texts. Out: a new cache that begins with the keys and values
of the longest common prefix. A template may render earlier turns differently; then the prefix ends there.

Keys and values belong to weights, and weights can change in between (training, an adapter that is put on). So all of
them are compared by sums over their bits: about the time of one token, whatever the prompt's length.
"""

from typing import NamedTuple

import torch

from qlora_lab.infer.cache import Cache
from qlora_lab.infer.stack import Stack
from qlora_lab.quant.quantize import QuantizedTensor


class Prefix(NamedTuple):
    """Tokens whose keys and values stand in `cache`, in each row from position 0 on."""

    ids: list[list[int]]
    cache: Cache
    weights: tuple  # of the stack that read them, from weights_of, and whether it read prompts in int8


def weights_of(stack: Stack) -> tuple:
    """Return what tells one stack from another: its numbers, and a sum over the bits of each tensor.

    The same numbers in another order have the same sum: no training leaves that, but who shuffles a weight by hand
    should begin a new conversation.
    """
    return _marks(stack._replace(rotary=None))


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


def _marks(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, _sum_of_bits(value)
    if isinstance(value, QuantizedTensor):
        constants = value.constants if isinstance(value.constants, torch.Tensor) else tuple(value.constants.plain)
        return _marks((value.packed, constants, value.levels, value.block_size, tuple(value.shape)))
    return tuple(map(_marks, value)) if isinstance(value, tuple) else value


def _sum_of_bits(tensor: torch.Tensor) -> int:
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    whole = len(flat) // 8 * 8
    aligned = flat.data_ptr() % 8 == 0
    words = flat[:whole].view(torch.int64) if aligned else flat[:whole].clone().view(torch.int64)
    return int(words.sum()) + int(flat[whole:].sum())  # the first wraps around, which loses nothing
