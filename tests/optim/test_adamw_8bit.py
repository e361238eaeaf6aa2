"""The readable 8-bit AdamW: its tables are bitsandbytes', its steps those of torch.optim.AdamW as far as 8 bits go."""

import pytest
import torch

from qlora_lab.optim.adamw_8bit import BLOCK, AdamW, Moments, adamw_8bit, dequantize_moment, quantize_moment
from qlora_lab.quant.codebook import evenly_spaced
from qlora_lab.quant.double_quant import dynamic_map


@pytest.mark.skipif(
    not torch.equal(evenly_spaced(0.1, 1, 129), torch.linspace(0.1, 1, 129)),
    reason="bitsandbytes makes its tables with torch.linspace, which rounds twice on this CPU",
)
def test_tables_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed), functional.create_dynamic_map(signed=signed))


def test_a_moment_keeps_half_a_step_of_its_table():
    moment = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize_moment(moment, dynamic_map())
    assert len(scale) == -(-1000 // BLOCK)
    step = dynamic_map().diff().max() / 2
    assert (
        (dequantize_moment(codes, scale, dynamic_map()) - moment).abs() <= step * scale.repeat_interleave(BLOCK)[:1000]
    ).all()


def test_the_first_step_is_that_of_torch():
    """Nothing has been through 8 bits yet, so only the order of the operations differs."""
    g = torch.Generator().manual_seed(0)
    ours = torch.randn(700, generator=g)
    theirs, grad = torch.nn.Parameter(ours.clone()), torch.randn(700, generator=g)
    state = [torch.zeros(700, dtype=torch.uint8), torch.zeros(3), torch.zeros(700, dtype=torch.uint8), torch.zeros(3)]
    adamw_8bit(ours, grad, Moments(*state), AdamW(step=1, lr=0.1, weight_decay=0.5))
    theirs.grad = grad
    torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.long
def test_it_finds_the_minimum_that_32_bits_find():
    g = torch.Generator().manual_seed(0)
    target = torch.randn(512, generator=g)
    ours, theirs = torch.zeros(512), torch.nn.Parameter(torch.zeros(512))
    state = [torch.zeros(512, dtype=torch.uint8), torch.zeros(2), torch.zeros(512, dtype=torch.uint8), torch.zeros(2)]
    optimizer = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.0)
    for step in range(1, 301):
        adamw_8bit(ours, ours - target, Moments(*state), AdamW(step=step, lr=0.02))
        theirs.grad = theirs.detach() - target
        optimizer.step()
    ours_left, theirs_left = ((p - target).norm().item() for p in (ours, theirs.detach()))
    assert theirs_left < ours_left < 0.05 * target.norm()  # 32 bits come closer, 8 bits far enough


@pytest.mark.parametrize(("given", "message"), [({"step": 0}, "step=0"), ({"step": 1, "beta1": 1.0}, "beta1=1.0")])
def test_errors_name_the_value(given, message):
    with pytest.raises(ValueError, match=message):
        AdamW(lr=0.1, **given)
