"""The NormalFloat explorer: what it shows is what the library computes, in every state."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from qlora_lab.quant.codebook import codebook, normal_float
from qlora_lab.show.normal_float import NormalFloatExplorer

EXPLORER = NormalFloatExplorer()


def test_starts_at_nf4():
    explorer = NormalFloatExplorer()
    assert torch.equal(explorer.result["levels"], codebook("nf4"))
    assert "4 bits, offset 0.9677083: 16 levels, relative error 0.8" in explorer.summary()


@settings(deadline=None, max_examples=15)
@given(
    bits=st.integers(2, 6),
    offset=st.sampled_from(EXPLORER._controls["offset"].choices),
    symmetric=st.booleans(),
)
def test_any_state(bits, offset, symmetric):
    EXPLORER.set(bits=bits, offset=offset, symmetric=symmetric)
    levels = normal_float(bits, offset, symmetric)
    assert torch.equal(EXPLORER.result["levels"], levels)
    drawn = np.array([segment[0][0] for segment in EXPLORER.levels.get_segments()])
    np.testing.assert_allclose(drawn, levels, rtol=1e-6)
    assert len(EXPLORER.bars.get_segments()) == 2**bits
    assert f"{len(levels)} levels" in EXPLORER.summary()


def test_a_state_that_is_not_allowed_is_named():
    with pytest.raises(ValueError, match="bits=7 is not allowed: from 2 to 6"):
        NormalFloatExplorer(bits=7)
