"""One weight: by hand for a small matrix, against plain torch for its adapter, and at the edges."""

import pytest
import torch

from qlora_lab.adapters.lora_linear import LoRALinear
from qlora_lab.measure.one_weight import LR, RANK, STEPS, TOKENS, follow
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.optim.paged_adamw import PagedAdamW
from qlora_lab.quant.codebook import codebook
from qlora_lab.quant.quantize import dequantize


def by_hand() -> torch.Tensor:
    """Two blocks of 16, with constants 2 and 1; the weight is 0.5, in row 1, column 3."""
    weight = torch.zeros(2, 16)
    weight[0, 0] = 2.0
    weight[1, 0] = -1.0
    weight[1, 3] = 0.5
    return weight


def test_every_number_of_storage_by_hand():
    seen = follow(by_hand(), 1, 3, block_size=16)
    assert (seen.position, seen.block, seen.place) == (19, 1, 3)
    assert (seen.value, seen.absmax, seen.scaled) == (0.5, 1.0, 0.5)
    # levels 12 and 13 of NF4 are 0.4407 and 0.5626: their midpoint lies above 0.5
    assert (seen.code, seen.level) == (12, 0.44070982933044434)
    assert seen.interval == pytest.approx((0.38931, 0.50166), abs=1e-5)
    # number 19 is odd, so it has the low half; number 18 is a zero, code 7
    assert (seen.byte, seen.packed, seen.high, seen.neighbour) == (9, 0x7C, False, 7)
    # the mean of the constants is 1.5; -0.5 is the largest deviation, and the 8-bit table has no -1
    assert (seen.absmax_offset, seen.absmax_scale, seen.absmax_code, seen.group) == (1.5, 0.5, 0, 0)
    assert seen.absmax_stored == pytest.approx(1.5 - 0.99296875 * 0.5, rel=1e-7)  # the table is float32
    assert seen.decoded == pytest.approx(0.44070982933044434 * 1.003515625, rel=1e-6)  # one rounding to float32
    assert seen.error == seen.decoded - 0.5
    assert seen.near.shape == (2, 15) and seen.near[seen.near_place] == 0.5


def test_a_neighbour_in_the_low_half():
    seen = follow(by_hand(), 1, 2, block_size=16)
    assert (seen.byte, seen.packed, seen.high, seen.code, seen.neighbour) == (9, 0x7C, True, 7, 12)


def test_the_window_stays_in_the_matrix():
    weight = torch.arange(30.0 * 40).view(30, 40)
    for row, column in ((0, 0), (29, 39), (15, 20), (2, 36)):
        seen = follow(weight, row, column)
        assert seen.near.shape == (7, 15) and seen.near[seen.near_place] == weight[row, column]


def test_the_adapter_is_that_of_plain_torch():
    """The same steps with torch.optim.AdamW and a dense decoded weight."""
    torch.manual_seed(1)
    weight = torch.randn(24, 32)
    seen = follow(weight, 5, 7)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, 32, generator=generator)
    start = LoRALinear(Linear4bit(seen.q), RANK, RANK, generator=generator)
    A, B = start.lora_A, start.lora_B
    optimizer = torch.optim.AdamW([A, B], lr=LR)
    dense = dequantize(seen.q)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (x @ (dense + B @ A).T - x @ weight.T).square().mean().backward()
        optimizer.step()
    close = {"rtol": 1e-3, "atol": 1e-6}  # other orders of the sums of 32, in ten steps
    torch.testing.assert_close(seen.step.grad_A, A.grad[:, 7], **close)
    torch.testing.assert_close(seen.step.grad_B, B.grad[5], **close)
    assert seen.step.correction == pytest.approx((B[5] @ A[:, 7]).item(), rel=1e-3)
    assert seen.step.moments[0] == pytest.approx(optimizer.state[B]["exp_avg"][5, 0].item(), rel=1e-3)
    assert seen.step.output == pytest.approx((dense[5] @ x[0]).item(), rel=1e-4)
    assert seen.step.activation == x[0, 7]
    assert (seen.product, seen.exact_product) == (seen.decoded * x[0, 7].item(), weight[5, 7].item() * x[0, 7].item())
    assert not list(start.base.parameters())  # nothing in the 4-bit layer could have a gradient


def test_the_page_is_where_the_moments_lie():
    """A marked moment is found in the bytes of that page and of no other."""
    step = follow(torch.linspace(-1, 1, 96 * 64).view(96, 64), 90, 3).step
    layer = [torch.nn.Parameter(torch.zeros(RANK, 64)), torch.nn.Parameter(torch.zeros(96, RANK))]
    optimizer = PagedAdamW(layer, page_size=step.page_size)
    for p in layer:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][1]["exp_avg"][90, 0] = 123.0
    optimizer.load_state_dict(state)
    pages = [optimizer.pages.page(i).view(torch.float32).clone() for i in range(optimizer.pages.count)]
    assert [i for i, page in enumerate(pages) if (page == 123).any()] == [step.page] == [4]
    assert step.page_count == len(pages) == 5 and len(step.resident) == 2


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 16),
        torch.full((3, 5), 0.25),  # an odd number of weights, one block, all alike
        torch.ones(1, 1),
        pytest.param(torch.linspace(-1, 1, 70).view(7, 10).bfloat16(), marks=pytest.mark.long),  # compiles
        torch.linspace(-1, 1, 70).view(7, 10).t(),  # not contiguous
    ],
    ids=["zeros", "alike", "one", "bf16", "turned"],
)
def test_edges_are_finite_and_agree_with_dequantize(weight):
    row, column = (n - 1 for n in weight.shape)
    seen = follow(weight, row, column)
    assert seen.decoded == dequantize(seen.q, torch.float32)[row, column]
    assert torch.tensor([seen.scaled, seen.error, seen.step.correction, *seen.step.moments]).isfinite().all()
    assert seen.value == weight[row, column]
    assert seen.packed == int(seen.q.packed[seen.byte])


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "e2m1"])
def test_the_interval_holds_the_scaled_weight(name):
    """FP4's codes are not in the order of its levels, and two of them are zero."""
    weight = torch.tensor([[-1.0, -0.7, -0.2, -0.01, -1e-4, 0.0, 1e-4, 0.01, 0.3, 0.9, 1.0]])
    for column in range(weight.numel()):
        seen = follow(weight, 0, column, name)
        low, high = seen.interval
        assert low <= seen.scaled <= high and low < high
        assert seen.level == codebook(name)[seen.code]


def test_gradients_may_be_switched_off_around_it():
    with torch.no_grad():
        assert follow(by_hand(), 1, 3).step.grad_B.any()


@pytest.mark.parametrize(
    ("weight", "place", "options", "sentence"),
    [
        (torch.ones(4, 4), (4, 0), {}, "row=4 is not allowed: it is a whole number of at most 3"),
        (torch.ones(4, 4), (0, -1), {}, "column=-1 is not allowed: it is a whole number of at least 0"),
        (torch.ones(4, 4), (0, 1.5), {}, "column=1.5 is not allowed: it is a whole number of at least 0"),
        (torch.full((4, 4), torch.nan), (0, 0), {}, "weight holds NaN or infinity: repair it"),
        (torch.ones(16), (0, 0), {}, r"weight has shape \(16,\), but it must be a matrix"),
        (torch.ones(0, 4), (0, 0), {}, "nothing to quantise"),
        (torch.ones(4, 4), (0, 0), {"codebook": "nf3"}, "codebook='nf3' has codes of 3 bits, but half a byte holds 4"),
        (torch.ones(4, 4), (0, 0), {"block_size": 7}, "block_size=7 is not allowed"),
    ],
)
def test_what_cannot_be_followed_is_said(weight, place, options, sentence):
    with pytest.raises(ValueError, match=sentence) as found:
        follow(weight, *place, **options)
    assert "\n" not in str(found.value)


def test_what_is_no_weight_is_named():
    for weight in ([[1.0]], torch.ones(2, 2, dtype=torch.int32), None):
        with pytest.raises(TypeError, match="weight is .*: it must be a tensor of float32"):
            follow(weight, 0, 0)
