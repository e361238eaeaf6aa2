"""The low-rank explorer: what it shows is the best product of two thin matrices, by numpy and by Eckart and Young."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from qlora_lab.show.low_rank import SIZES, LowRankExplorer, best_of_rank, energy, target

EXPLORER = LowRankExplorer()


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


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0])
def test_the_target_has_the_spectrum_it_names(size, decay):
    found = np.linalg.svd(target(size, decay).numpy(), compute_uv=False)
    np.testing.assert_allclose(found, np.arange(1, size + 1) ** -decay, atol=2e-6)


@settings(deadline=None, max_examples=6)
@given(r=st.integers(1, 32), size=st.sampled_from(SIZES), decay=st.sampled_from(EXPLORER._controls["decay"].choices))
def test_any_state(r, size, decay):
    EXPLORER.set(r=r, size=size, decay=decay)
    s = np.arange(1, size + 1) ** -decay
    kept, result = np.square(s[:r]).sum() / np.square(s).sum(), EXPLORER.result
    assert result["parameters"] == 2 * size * r
    np.testing.assert_allclose([result["energy"], result["relative_error"] ** 2], [kept, 1 - kept], atol=1e-5)
    shown = [image.get_array() for image in EXPLORER.images]
    np.testing.assert_allclose(shown[1] + shown[2], shown[0], atol=1e-6)
    assert np.linalg.matrix_rank(shown[1], tol=1e-5) == r
    assert (len(EXPLORER.kept.get_segments()), len(EXPLORER.cut_off.get_segments())) == (r, size - r)
    np.testing.assert_allclose([line[1][1] for line in EXPLORER.kept.get_segments()], s[:r], atol=1e-5)
    assert f"r={r}: {2 * size * r:,} parameters" in EXPLORER.summary()


def test_the_sentence_at_the_start():
    """Decay 1, r=8 of 64: the sum of 1/k^2 up to 8 over the one up to 64 is 1.5274 / 1.6294."""
    want = "64 x 64, decay 1, r=8: 1,024 parameters, 25 % of 4,096; 93.7 % of the energy, relative error 25.0 %"
    assert LowRankExplorer().summary() == want


def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match="size=48 is not allowed: one of 32, 64, 128"):
        LowRankExplorer(size=48)
