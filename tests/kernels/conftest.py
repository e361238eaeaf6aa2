"""Tensors that are hard to quantise, and which form of a kernel runs."""

import pytest
import torch
from hypothesis import strategies as st

from qlora_lab.kernels import _choose, cpu
from qlora_lab.quant.codebook import codebook, midpoints


@pytest.fixture(autouse=True)
def kernels(with_kernels):
    """These tests are of the kernels."""


FORMS = [True, False] if cpu.FAST else [False]  # 16 look-ups at once; plain loops


@pytest.fixture(params=FORMS, ids=lambda fast: "vector" if fast else "plain")
def form(request, monkeypatch):
    monkeypatch.setattr(cpu, "FAST", request.param)
    yield
    _choose.cache_clear()  # a choice that was made meanwhile says why, and would be kept


def hard(seed: int, n: int, block_size: int, scale: float, hole: int) -> torch.Tensor:
    """Normal weights with a run of zeros, exact midpoints, denormals and outliers among them."""
    g = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(n, generator=g)
    weight[hole : hole + block_size + 7] = 0
    ties = torch.cat([midpoints(codebook("nf4")), midpoints(codebook("fp4").sort().values), torch.ones(1)])
    weight[n // 3 : n // 3 + len(ties)] = ties[: max(0, n - n // 3)]
    weight[n // 2 : n // 2 + block_size] *= 2.0**-120
    weight[-3:] *= 50
    return weight


weights = st.builds(
    hard,
    seed=st.integers(0, 2**31),
    n=st.one_of(st.integers(1, 9000), st.sampled_from([4096, 8192, 8192 + 4096, 8192 + 5])),  # whole blocks, and not
    block_size=st.just(64),
    scale=st.sampled_from([1e-44, 1e-38, 1e-6, 0.02, 1.0, 1e30, 6e36]),
    hole=st.integers(0, 5000),
)
block_sizes = st.one_of(st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]), st.integers(16, 4096))
