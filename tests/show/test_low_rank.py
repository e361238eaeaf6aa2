"""The low-rank explorer shows the numbers of measure/low_rank.py, compared with numpy."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from qlora_lab.show.low_rank import SIZES, LowRankExplorer

EXPLORER = LowRankExplorer()


@pytest.mark.long
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


@pytest.mark.long
def test_the_sentence_at_the_start():
    """Decay 1, r=8 of 64: the sum of 1/k^2 up to 8 over the one up to 64 is 1.5274 / 1.6294."""
    want = "64 x 64, decay 1, r=8: 1,024 parameters, 25 % of 4,096; 93.7 % of the energy, relative error 25.0 %"
    assert LowRankExplorer().summary() == want


@pytest.mark.long
def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match="size=48 is not allowed: one of 32, 64, 128"):
        LowRankExplorer(size=48)
