"""Attention and head in float32: nearer to the float64 model than bf16 is, and only where it pays."""

from copy import deepcopy

import pytest
import torch

from qlora_lab.kernels import product
from qlora_lab.kernels.product import Race
from qlora_lab.model.pair_attention import NAME as PAIRS
from qlora_lab.model.wide import FEW, NAME, WideHead, widen

SLOW_BFLOAT16, FAST_BFLOAT16 = Race(1.0, 1.0, 2.0), Race(1.0, 1.0, 0.25)


@pytest.fixture
def slow_bfloat16(monkeypatch):
    monkeypatch.setattr(product, "race", lambda: SLOW_BFLOAT16)


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
    assert widen(model) and model.config._attn_implementation == NAME
    for wanted, before, after in zip(exact, narrow, outputs(model), strict=True):
        # weights, norms and sums are bf16 as before, so the error is of the same size: a third more is allowed for luck
        assert 0 < (after - wanted).norm() < 1.33 * (before - wanted).norm()


def test_it_is_left_alone_where_it_would_not_pay(tiny_llama, monkeypatch):
    monkeypatch.setattr(product, "race", lambda: SLOW_BFLOAT16)
    assert not widen(tiny_llama.float())
    monkeypatch.setattr(product, "race", lambda: FAST_BFLOAT16)
    assert not widen(tiny_llama.bfloat16())
    monkeypatch.setattr(product, "race", lambda: SLOW_BFLOAT16)
    tiny_llama.set_attn_implementation("eager")
    assert not widen(tiny_llama) and tiny_llama.config._attn_implementation == "eager"


def test_widening_twice_is_widening_once(tiny_llama, slow_bfloat16):
    assert widen(tiny_llama.bfloat16()) and widen(tiny_llama)
    assert tiny_llama.config._attn_implementation == NAME


def test_it_is_taken_back_where_the_race_says_so(tiny_llama, monkeypatch):
    """As a resume does, on a machine whose own race ends otherwise."""
    monkeypatch.setattr(product, "race", lambda: SLOW_BFLOAT16)
    widen(tiny_llama.bfloat16())
    monkeypatch.setattr(product, "race", lambda: FAST_BFLOAT16)
    assert not widen(tiny_llama) and tiny_llama.config._attn_implementation in ("sdpa", PAIRS)


def test_a_mask_of_numbers_is_widened_too(tiny_llama, slow_bfloat16):
    ids = torch.arange(3, 9)[None]
    mask = torch.full((1, 1, 6, 6), float("-inf")).triu(1).bfloat16()
    widen(tiny_llama.bfloat16())
    assert torch.equal(tiny_llama(ids, attention_mask=mask).logits, tiny_llama(ids).logits)


@pytest.mark.parametrize("rows", [1, FEW, FEW + 1, 300])
def test_the_head_gives_the_exact_products_logits_in_float32(rows, tiny_llama, slow_bfloat16, monkeypatch):
    monkeypatch.setattr(product, "PANEL", 16 * 100)  # some panels, the last one not full
    model = tiny_llama.bfloat16().requires_grad_(False)
    widen(model)
    x = torch.randn(2, rows, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    logits, weight = model.lm_head(x[:1]), model.lm_head.weight.double()
    assert logits.dtype == torch.float32 and logits.shape == (1, rows, len(weight))
    wanted = x[:1].detach().double() @ weight.t()
    # float32 sums err by some 16 x 2^-24, bf16's rounding by 2^-8
    assert (logits - wanted).norm() < (1e-6 if rows > FEW else 2**-7) * wanted.norm()
    grad = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    logits.backward(grad)
    assert x.grad.dtype == torch.bfloat16 and not x.grad[1].any()
    # rounded once, and before that for few rows the incoming gradient too
    assert (x.grad[:1] - grad.double() @ weight).norm() < 2**-7 * (grad.double() @ weight).norm()


def test_the_head_shares_its_weight_and_is_plain_again_where_the_race_says_so(tiny_llama, monkeypatch):
    model = tiny_llama.bfloat16().eval()
    model.config.tie_word_embeddings, model.lm_head.weight = True, model.model.embed_tokens.weight
    names = set(model.state_dict())
    monkeypatch.setattr(product, "race", lambda: SLOW_BFLOAT16)
    widen(model)
    assert type(model.lm_head) is WideHead and not model.lm_head.training
    assert model.lm_head.weight is model.model.embed_tokens.weight and set(model.state_dict()) == names
    monkeypatch.setattr(product, "race", lambda: FAST_BFLOAT16)
    widen(model)
    assert type(model.lm_head) is torch.nn.Linear and model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_that_is_cast_afterwards_has_its_own_products(tiny_llama, slow_bfloat16, monkeypatch):
    model = tiny_llama.bfloat16().requires_grad_(False)
    widen(model)
    monkeypatch.setattr(product, "forward_unpacked", lambda *_: pytest.fail("nothing is left to widen"))
    x = torch.ones(FEW + 1, 16)
    assert torch.equal(model.float().lm_head(x), torch.nn.functional.linear(x, model.lm_head.weight))
    assert model.bfloat16().to("meta").lm_head(x.bfloat16().to("meta")).dtype == torch.float32


def test_a_head_that_is_trained_has_its_gradient(tiny_llama, slow_bfloat16):
    model = tiny_llama.bfloat16()
    widen(model)
    x = torch.ones(FEW + 1, 16, dtype=torch.bfloat16)
    model.lm_head(x).sum().backward()
    assert torch.equal(model.lm_head.weight.grad, torch.full_like(model.lm_head.weight, FEW + 1))
