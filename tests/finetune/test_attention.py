"""Attention in float32: nearer to the float64 model than bf16 is, with the same masks, and only where it pays."""

from copy import deepcopy

import pytest
import torch

from qlora_lab.finetune import attention
from qlora_lab.finetune.attention import NAME, widen_attention
from qlora_lab.kernels.product import Race

SLOW_BFLOAT16, FAST_BFLOAT16 = Race(1.0, 1.0, 2.0), Race(1.0, 1.0, 0.25)


@pytest.fixture
def slow_bfloat16(monkeypatch):
    monkeypatch.setattr(attention, "race", lambda: SLOW_BFLOAT16)


def outputs(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a padded batch where there is a token, and the gradient of the first layer's queries."""
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    model.zero_grad()
    logits = model(input_ids=torch.arange(24).view(2, 12) + 3, attention_mask=mask).logits[mask.bool()]
    logits.double().square().sum().backward()
    return logits.detach().double(), model.model.layers[0].self_attn.q_proj.weight.grad.double()


def test_it_attends_to_the_same_tokens(tiny_llama, slow_bfloat16):
    model = tiny_llama.bfloat16().requires_grad_(True)
    exact, narrow = outputs(deepcopy(model).double()), outputs(deepcopy(model))
    assert widen_attention(model) and model.config._attn_implementation == NAME
    for wanted, before, after in zip(exact, narrow, outputs(model), strict=True):
        # weights, norms and sums are bf16 as before, so the error is of the same size: a third more is allowed for luck
        assert 0 < (after - wanted).norm() < 1.33 * (before - wanted).norm()


def test_it_is_left_alone_where_it_would_not_pay(tiny_llama, monkeypatch):
    monkeypatch.setattr(attention, "race", lambda: SLOW_BFLOAT16)
    assert not widen_attention(tiny_llama.float())
    monkeypatch.setattr(attention, "race", lambda: FAST_BFLOAT16)
    assert not widen_attention(tiny_llama.bfloat16())
    monkeypatch.setattr(attention, "race", lambda: SLOW_BFLOAT16)
    tiny_llama.set_attn_implementation("eager")
    assert not widen_attention(tiny_llama) and tiny_llama.config._attn_implementation == "eager"


def test_widening_twice_is_widening_once(tiny_llama, slow_bfloat16):
    assert widen_attention(tiny_llama.bfloat16()) and widen_attention(tiny_llama)
    assert tiny_llama.config._attn_implementation == NAME


def test_it_is_taken_back_where_the_race_says_so(tiny_llama, monkeypatch):
    """As a resume does, on a machine whose own race ends otherwise."""
    monkeypatch.setattr(attention, "race", lambda: SLOW_BFLOAT16)
    widen_attention(tiny_llama.bfloat16())
    monkeypatch.setattr(attention, "race", lambda: FAST_BFLOAT16)
    assert not widen_attention(tiny_llama) and tiny_llama.config._attn_implementation == "sdpa"


def test_a_mask_of_numbers_is_widened_too(tiny_llama, slow_bfloat16):
    ids = torch.arange(3, 9)[None]
    mask = torch.full((1, 1, 6, 6), float("-inf")).triu(1).bfloat16()
    widen_attention(tiny_llama.bfloat16())
    assert torch.equal(tiny_llama(ids, attention_mask=mask).logits, tiny_llama(ids).logits)
