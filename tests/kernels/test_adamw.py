"""The CPU kernel of 8-bit AdamW gives the bits of its readable twin: any length, dtype, size of numbers, bad block."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from qlora_lab.kernels import OVERRIDE, adamw, choose
from qlora_lab.optim.adamw_8bit import BLOCK, AdamW, Moments, adamw_8bit, change_8bit, tables
from qlora_lab.quant.blocks import TINY
from tests.kernels.test_cpu import same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def state_of(n: int) -> list[torch.Tensor]:
    n_blocks = -(-n // BLOCK)
    return [torch.zeros(size, dtype=dtype) for size, dtype in 2 * [(n, torch.uint8), (n_blocks, torch.float32)]]


def step(tensors: list, grad: torch.Tensor, how: AdamW) -> None:
    param, codes1, scale1, codes2, scale2 = tensors
    adamw.adamw_8bit(param, grad, codes1, scale1, codes2, scale2, tables(param.device), how.scalars, TINY)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 1300),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1e-42, 1e-20, 1e-6, 1.0, 1e4, 1e25]),  # the square of the last is infinite
    st.sampled_from([None, torch.nan, torch.inf, -torch.inf, 1e30, -0.0]),
    st.sampled_from([1e-8, 0.0]),
)
def test_it_is_the_readable_step(n, dtype, size, bad, eps):
    g = torch.Generator().manual_seed(n)
    ours = [torch.randn(n, generator=g).to(dtype), *state_of(n)]
    twin = [tensor.clone() for tensor in ours]
    for number in (1, 2, 3):
        how = AdamW(number, lr=1e-2, weight_decay=0.1, eps=eps)
        grad = (size * torch.randn(n, generator=g)).to(dtype)
        if bad is not None and number == 2:
            grad[n // 2] = bad
        step(ours, grad, how)
        adamw_8bit(twin[0], grad, Moments(*twin[1:]), how)
        assert all(same_bits(a, b) for a, b in zip(ours, twin, strict=True)), number


def test_each_level_comes_back():
    """A moment that nothing is added to is multiplied by beta and meets its own level again."""
    codes = torch.arange(256, dtype=torch.uint8)
    ours = [torch.ones(256), codes.clone(), torch.ones(1), codes.clone(), torch.ones(1)]
    step(ours, torch.zeros(256), AdamW(1, lr=0.0, beta1=0.5, beta2=0.5))
    assert torch.equal(ours[1], codes) and torch.equal(ours[3], codes) and ours[2].item() == ours[4].item() == 0.5


def test_one_bad_gradient_spoils_its_block_alone():
    ours, grad = [torch.ones(600), *state_of(600)], torch.ones(600)
    grad[300] = torch.nan
    step(ours, grad, AdamW(1, lr=1e-2))
    assert ours[2].isnan().tolist() == ours[4].isnan().tolist() == [False, True, False]
    assert ours[0].isnan().nonzero().tolist() == [[300]]


def test_a_table_with_many_levels_between_two_prefixes():
    """The kernel finds a code from the upper 16 bits of a value: here they tell nothing."""
    levels = 0.5 + torch.arange(256) * 2.0**-24
    given = levels, (levels[:-1] + levels[1:]) / 2
    scaled = torch.cat([levels, given[1]])
    ours = [torch.ones(511), *state_of(511)]
    args = ours[0], scaled, *ours[1:], (*given, *given), (0.0, 0.0, 1.0, 0.0, 1.0, 1e-8), TINY
    scaled[0] = scaled[256] = 1.0  # the constant of both blocks
    adamw.adamw_8bit(*args)
    want = torch.bucketize(scaled, given[1]).to(torch.uint8)
    assert torch.equal(ours[1], want)


def test_it_runs_where_it_is_chosen(monkeypatch):
    calls = []
    monkeypatch.setattr(adamw, "adamw_8bit", lambda *args: calls.append(len(args)))
    change_8bit(torch.ones(3), torch.ones(3), Moments(*state_of(3)), AdamW(1, lr=0.1))
    assert calls == [9]
    monkeypatch.setenv(OVERRIDE, "reference")
    p = torch.ones(3)
    change_8bit(p, torch.ones(3), Moments(*state_of(3)), AdamW(1, lr=0.1))
    assert calls == [9] and p[0] < 1 and choose("cpu").adamw is None


@pytest.mark.parametrize(
    ("which", "wrong", "message"),
    [
        (0, torch.ones(3, dtype=torch.float64), r"param is torch.float64, \(3,\) and contiguous"),
        (1, torch.ones(4), r"grad is torch.float32, \(4,\) and contiguous: it must be torch.float32 or .*, \(3,\)"),
        (1, torch.ones(6)[::2], "grad is .* and not contiguous"),
        (2, torch.zeros(3), "codes1 is torch.float32"),
        (5, torch.zeros(2), r"scale2 is torch.float32, \(2,\)"),
    ],
)
def test_what_it_would_misread_is_refused(which, wrong, message):
    args = [torch.ones(3), torch.ones(3), *state_of(3)]
    args[which] = wrong
    with pytest.raises(ValueError, match=message):
        adamw.adamw_8bit(*args, tables(torch.device("cpu")), AdamW(1, lr=0.1).scalars, TINY)


def test_tables_are_checked_too():
    first, limits, *second = tables(torch.device("cpu"))
    args = [torch.ones(3), torch.ones(3), *state_of(3)]
    with pytest.raises(ValueError, match=r"thresholds1 is torch.float32, \(254,\)"):
        adamw.adamw_8bit(*args, (first, limits[1:], *second), AdamW(1, lr=0.1).scalars, TINY)
