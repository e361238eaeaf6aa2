"""The keys and values of all tokens so far, so that a new token computes its own alone.

All memory is taken at the beginning: a cache that grows is copied with each growth. With C = capacity, the most tokens
of a row, it is, in float32,

    bytes = 4 * (2 * layers * rows * key heads * C * head_dim  +  2 * C * head_dim)

The first part is keys and values, the second the cosines and sines of rotary embeddings. For SmolLM2-135M that is
45 KiB a token. The system gives memory when it is first written to, so a cache that stays half empty costs half.

In 8 bits, a key or value of one head is a block of INT8, as quant/ quantises weights, and its constant a float32: the
first part shrinks to (head_dim + 4) / (4 head_dim), a bit more than a quarter.
"""

from dataclasses import dataclass, replace

import torch

from qlora_lab.infer.stack import Stack
from qlora_lab.quant.quantize import dequantize, quantize

BITS = (32, 8)


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of `rows` texts."""

    keys: torch.Tensor  # (layers, rows, key heads, capacity, head_dim) float32, or uint8 codes; turned by positions
    values: torch.Tensor  # the same
    key_absmax: torch.Tensor  # of codes: (layers, rows, key heads, capacity) float32; of float32 none, (..., 0)
    value_absmax: torch.Tensor  # the same
    cos: torch.Tensor  # (capacity, head_dim) float32
    sin: torch.Tensor
    lengths: torch.Tensor  # (rows,) int64: tokens that are there

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def kept(self) -> tuple[torch.Tensor, ...]:
        """What belongs to the tokens of a row: their position is its fourth index."""
        return self.keys, self.values, self.key_absmax, self.value_absmax

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, their constants, cosines and sines."""
        return sum(tensor.nbytes for tensor in (*self.kept, self.cos, self.sin))

    def check_room(self, rows: torch.Tensor, tokens: int) -> None:
        """Raise ValueError if one of `rows` (rows,) has no place for `tokens` more."""
        longest = int(self.lengths[rows].max()) + tokens
        if longest > self.capacity:
            raise ValueError(f"{longest} tokens do not fit into a cache of {self.capacity}: make a larger one")

    def put(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (key heads, tokens, head_dim) behind what is there, and return all, (key heads, all tokens, head_dim).

        What is returned is float32, and what was rounded comes back rounded. `lengths` grows only when the last layer
        has its part.
        """
        start = int(self.lengths[row])
        stop = start + keys.shape[1]
        theirs = (self.keys, self.key_absmax, keys), (self.values, self.value_absmax, values)
        return tuple(_put(codes[layer, row], absmax[layer, row], new, start, stop) for codes, absmax, new in theirs)


def _put(kept: torch.Tensor, absmax: torch.Tensor, new: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    if kept.dtype == torch.float32:
        kept[:, start:stop] = new
        return kept[:, :stop]
    blocks = quantize(new, "int8", new.shape[-1], keep_non_finite=True)  # a NaN is found, and named, behind the layer
    kept[:, start:stop] = blocks.packed.view(new.shape)
    absmax[:, start:stop] = blocks.absmax.view(new.shape[:-1])
    every = {"packed": kept[:, :stop].flatten(), "constants": absmax[:, :stop].flatten()}
    return dequantize(replace(blocks, **every, shape=kept[:, :stop].shape))


def make_cache(stack: Stack, rows: int, capacity: int, bits: int = 32) -> Cache:
    """Return an empty cache for `rows` texts of at most `capacity` tokens, with keys and values in 32 or 8 bits."""
    # capacity behind the heads: a head's keys lie side by side, as attention reads them
    shape = len(stack.layers), rows, stack.kv_heads, capacity, stack.head_dim
    dtype, constants = (torch.float32, 0) if bits == 32 else (torch.uint8, capacity)
    keys, values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
    absmax = (torch.empty(*shape[:3], constants, dtype=torch.float32) for _ in range(2))
    return Cache(keys, values, *absmax, *stack.rotary(capacity), torch.zeros(rows, dtype=torch.int64))
