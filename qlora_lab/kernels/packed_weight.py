"""A quantised weight as kernels take it: plain tensors with names, and nothing that only this library knows."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


class PackedConstants(NamedTuple):
    """Block constants that are quantised themselves."""

    codes: torch.Tensor  # (n_blocks,) uint8
    scale: torch.Tensor  # (n_groups,) float32
    offset: torch.Tensor  # () float32
    table: torch.Tensor  # (256,) float32, what each code stands for
    group: int  # codes that share a scale


@dataclass(eq=False)
class PackedWeight:
    """A weight in the form that kernels read.

    prepared: a cache that belongs to whichever kernel reads this weight: (key, its own view of the tensors). A token of
    an answer asks for each weight of a model once, and checking them anew would be a third of a GPU's launch. The key
    holds addresses, because a storage that processes share can move.
    """

    packed: torch.Tensor  # (n_bytes,) uint8
    constants: torch.Tensor | PackedConstants  # (n_blocks,) float32, or those of double quantization
    levels: torch.Tensor  # (n_levels,) float32
    block_size: int
    prepared: tuple[Any, Any] | None = None
