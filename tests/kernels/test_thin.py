"""Thin products with x in bf16 against float64, at few and odd numbers of tokens, and against torch's rounding."""

import pytest
import torch

from qlora_lab.kernels import cpu, thin

pytestmark = [
    pytest.mark.long,  # compiles for seconds
    pytest.mark.skipif(not cpu.FAST, reason="product.py does not ask without vectors"),
]

CASES = [(1, 64, 128, 8), (5, 192, 64, 16), (70, 320, 192, 24), (131, 64, 64, 8)]  # tokens, columns, size, r


def drawn(tokens, columns, size, r):
    g = torch.Generator().manual_seed(tokens)
    x, out = (torch.randn(tokens, n, generator=g).bfloat16() for n in (columns, size))
    return x, torch.randn(columns, r, generator=g), torch.randn(r, size, generator=g), out


def near(result: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> bool:
    """Tell whether left @ right is right as float32 sums are: one rounding of 2^-24 for each of its terms."""
    exact, size = left.double() @ right.double(), left.double().abs() @ right.double().abs()
    return bool(((result.double() - exact).abs() <= size * left.shape[1] * 2.0**-24).all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_product_is_a_float32_sum(case):
    x, down, up, out = drawn(*case)
    low = torch.full((case[0], case[3]), torch.nan)
    thin.lower(x, down, low)
    assert near(low, x, down)
    assert near(thin.outer(low, x), low.t(), x)
    both = torch.cat([low, torch.ones(case[0], 1), out.float()], 1)  # what is there is one more term of the sum
    before, exact = out.clone(), low.double() @ up.double() + out.double()
    thin.add(out, low, up)
    size = low.double().abs() @ up.double().abs() + before.double().abs()
    assert ((out.double() - exact).abs() <= exact.abs() * 2.0**-8 + size * both.shape[1] * 2.0**-24).all()


def test_x_may_lie_anywhere():
    x, down, up, out = drawn(70, 128, 64, 8)
    low, other = torch.empty(70, 8), torch.empty(70, 8)
    thin.lower(x, down, low)
    thin.lower(x.t().contiguous().t(), down.t().contiguous().t(), other)
    assert torch.equal(low, other)
    assert torch.equal(thin.outer(low, x), thin.outer(low, x.t().contiguous().t()))
    turned = out.clone()
    thin.add(out, low, up)
    thin.add(turned, low, up.t().contiguous().t())
    assert torch.equal(out, turned)


def test_a_sum_depends_neither_on_threads_nor_on_other_tokens(one_thread):
    x, down, up, out = drawn(131, 192, 320, 16)

    def all_of_them():
        low, result = torch.empty(131, 16), out.clone()
        thin.lower(x, down, low)
        thin.add(result, low, up)
        return low, result, thin.outer(low, x)

    alone = all_of_them()
    torch.set_num_threads(2)  # the fixture sets the number back
    assert all(map(torch.equal, alone, all_of_them()))
    few = torch.empty(3, 16)
    thin.lower(x[:3], down, few)
    assert torch.equal(few, alone[0][:3])


def test_sums_are_rounded_as_torch_rounds():
    out = torch.zeros(6, 64).bfloat16()
    values = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, torch.inf, torch.nan, 1e-40, -(2.0**-133)])  # ties, odd ends
    low = torch.zeros(6, 8)
    low[:, 0] = values
    up = torch.zeros(8, 64)
    up[0] = 1
    thin.add(out, low, up)
    expected = values.bfloat16()[:, None].expand(6, 64)
    assert torch.allclose(out, expected, rtol=0, atol=0, equal_nan=True)
