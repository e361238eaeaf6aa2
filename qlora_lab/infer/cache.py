"""The keys and values of all tokens so far, so that a new token computes its own alone.

All memory is taken at the beginning: a cache that grows is copied with each growth. With C = capacity, the most tokens
of a row, it is, in float32,

    bytes = 4 * (2 * layers * rows * key heads * C * head_dim  +  2 * C * head_dim)

The first part is keys and values, the second the cosines and sines of rotary embeddings. For SmolLM2-135M that is
45 KiB a token. The system gives memory when it is first written to, so a cache that stays half empty costs half.
"""

from dataclasses import dataclass

import torch

from qlora_lab.infer.stack import Stack


@dataclass(frozen=True, eq=False)
class Cache:
    """Keys and values of `rows` texts."""

    keys: torch.Tensor  # (layers, rows, key heads, capacity, head_dim) float32, turned by their positions
    values: torch.Tensor  # the same
    cos: torch.Tensor  # (capacity, head_dim) float32
    sin: torch.Tensor
    lengths: torch.Tensor  # (rows,) int64: tokens that are there

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values, cosines and sines."""
        return sum(tensor.nbytes for tensor in (self.keys, self.values, self.cos, self.sin))

    def check_room(self, rows: torch.Tensor, tokens: int) -> None:
        """Raise ValueError if one of `rows` (rows,) has no place for `tokens` more."""
        longest = int(self.lengths[rows].max()) + tokens
        if longest > self.capacity:
            raise ValueError(f"{longest} tokens do not fit into a cache of {self.capacity}: make a larger one")

    def put(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (key heads, tokens, head_dim) behind what is there, and return all, (key heads, all tokens, head_dim).

        `lengths` grows only when the last layer has its part.
        """
        start = int(self.lengths[row])
        stop = start + keys.shape[1]
        self.keys[layer, row, :, start:stop] = keys
        self.values[layer, row, :, start:stop] = values
        return self.keys[layer, row, :, :stop], self.values[layer, row, :, :stop]


def make_cache(stack: Stack, rows: int, capacity: int) -> Cache:
    """Return an empty cache for `rows` texts of at most `capacity` tokens."""
    shape = len(stack.layers), rows, stack.kv_heads, capacity, stack.head_dim
    keys, values = torch.empty(shape), torch.empty(shape)
    return Cache(keys, values, *stack.rotary(capacity), torch.zeros(rows, dtype=torch.int64))
