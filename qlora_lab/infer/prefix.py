"""Continue from what a cache has read: a conversation's next question then costs its own tokens, not all of them.

In: the cache of an earlier answer with its tokens, and new texts. Out: a new cache that begins with the keys and values
of the longest common prefix. A template may render earlier turns differently; then the prefix ends there.

Keys and values belong to weights, and weights can change in between (training, an adapter that is put on). So all of
them are compared by sums over their bits: the time of a few tokens, whatever the prompt's length.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from qlora_lab.infer.cache import Cache
from qlora_lab.infer.stack import Stack
from qlora_lab.quant.quantize import QuantizedTensor

RUNS = 1024  # of words in a large tensor: their order counts, the order within one does not


class Prefix(NamedTuple):
    """Tokens whose keys and values stand in `cache`, in each row from position 0 on."""

    ids: list[list[int]]
    cache: Cache
    weights: tuple  # of the stack that read them, from weights_of, and whether they computed in int8


def weights_of(stack: Stack) -> tuple:
    """Return what tells one stack from another: its numbers, small tensors as they are, and sums over large ones.

    Numbers that change places within a run (a thousandth of a large tensor) leave its sum as it was. Training does not
    do that; if you move single weights by hand, begin a new conversation.
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
        return tuple(value.shape), value.dtype, _bits(value)
    if isinstance(value, QuantizedTensor):
        constants = value.constants if isinstance(value.constants, torch.Tensor) else tuple(value.constants.plain)
        return _marks((value.packed, constants, value.levels, value.block_size, tuple(value.shape)))
    return tuple(map(_marks, value)) if isinstance(value, tuple) else value


def _bits(tensor: torch.Tensor) -> bytes | tuple[int, bytes]:
    """Return the bytes of a small tensor; of a large one a sum over words of 8 bytes, each run of them with a factor.

    A sum without factors was the same for x and -x in 13 of 200 random x of (128, 2), and for any order of the rows.
    """
    # numpy: a model has a thousand tensors, and torch takes longer to begin with most of them than to add them up
    flat = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    if len(flat) <= 8 * RUNS:
        return flat.tobytes()
    length = len(flat) // (8 * RUNS)
    whole = 8 * RUNS * length
    runs = flat[:whole].view(np.int64).reshape(RUNS, length).sum(1)  # (RUNS,); a wrap loses nothing
    return int(runs @ _factors()), flat[whole:].tobytes()


@lru_cache
def _factors() -> np.ndarray:
    """(RUNS,) int64, odd, so that no bit of a sum is lost."""
    return np.random.default_rng(0).integers(-(2**62), 2**62, RUNS) * 2 + 1
