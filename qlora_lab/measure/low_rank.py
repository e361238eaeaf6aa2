"""Find the best product of two thin matrices for a matrix, and measure what a rank can hold.

Source: Eckart and Young (1936): of all products of rank r, the first r terms of the singular value decomposition are
nearest.
"""

from functools import lru_cache

import torch


@lru_cache  # a moving slider asks for the same sizes again, and nothing else takes as long
def directions(size: int) -> torch.Tensor:
    """Return (2, size, size) float32: two random orthogonal matrices, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.linalg.qr(torch.randn(2, size, size, dtype=torch.float32, generator=generator)).Q


def target(size: int, decay: float) -> torch.Tensor:
    """Make (size, size) float32 with singular values k^-decay, k = 1, 2, ..., in random directions."""
    left, right = directions(size)
    return left * torch.arange(1, size + 1, dtype=torch.float32) ** -decay @ right.t()


def best_of_rank(matrix: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return B, (out, r), and A, (r, in), whose product is nearest to `matrix`; and its singular values, descending.

    >>> B, A, s = best_of_rank(torch.tensor([[8.0, 16, 4], [4, 8, 2], [12, 24, 6]]), 1)
    >>> (B @ A).round().tolist()
    [[8.0, 16.0, 4.0], [4.0, 8.0, 2.0], [12.0, 24.0, 6.0]]
    """
    U, s, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :r] * s[:r], Vh[:r], s  # (out, r), (r, in), (min(out, in),)


def energy(singular_values: torch.Tensor) -> torch.Tensor:
    """Return the share of the sum of squares in the first 1, 2, ... directions: the same shape, ending at 1."""
    squares = singular_values.square()
    return squares.cumsum(0) / squares.sum()


def relative_error(matrix: torch.Tensor, product: torch.Tensor) -> float:
    """Return the norm of what is missing over the norm of the matrix.

    >>> relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    0.800000011920929
    """
    return ((matrix - product).norm() / matrix.norm()).item()
