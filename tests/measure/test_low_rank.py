"""The best product of two thin matrices, by numpy and by Eckart and Young."""

import numpy as np
import pytest
import torch

from qlora_lab.measure.low_rank import best_of_rank, energy, target


@pytest.mark.parametrize("shape", [(7, 7), (9, 4), (4, 9)])
def test_nothing_of_that_rank_is_nearer(shape):
    """The error is the root of the squared singular values that are cut off, and no nudge of B or A lowers it."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64)
    B, A, s = best_of_rank(matrix, 3)
    assert (B.shape, A.shape, s.shape) == ((shape[0], 3), (3, shape[1]), (min(shape),))
    error = (matrix - B @ A).norm()
    np.testing.assert_allclose(error, np.sqrt(np.square(np.linalg.svd(matrix.numpy())[1][3:]).sum()), rtol=1e-12)
    for _ in range(50):
        nudged = [M + 1e-3 * torch.randn(M.shape, generator=generator, dtype=M.dtype) for M in (B, A)]
        assert (matrix - nudged[0] @ nudged[1]).norm() > error


def test_energy_by_hand():
    """Singular values 3, 2, 1: squares 9, 4, 1 of 14."""
    torch.testing.assert_close(energy(torch.tensor([3.0, 2, 1])), torch.tensor([9.0, 13, 14]) / 14)


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_the_target_has_the_spectrum_it_names(size, decay):
    found = np.linalg.svd(target(size, decay).numpy(), compute_uv=False)
    np.testing.assert_allclose(found, np.arange(1, size + 1) ** -decay, atol=2e-6)
