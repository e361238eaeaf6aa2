"""Attention of a bf16 model in pairs: which calls our kernel takes, and that a model computes what it did."""

from copy import deepcopy

import pytest
import torch

from qlora_lab.kernels import product, words
from qlora_lab.kernels.product import Race
from qlora_lab.model import pair_attention
from qlora_lab.model.pair_attention import NAME, attend
from qlora_lab.model.wide import widen
from qlora_lab.train.identity import adopt_arithmetic, arithmetic

needs_pairs = pytest.mark.skipif(not words.has_pairs(), reason="needs AVX512-BF16")


@pytest.fixture
def model(monkeypatch, with_kernels):
    from transformers import LlamaConfig, LlamaForCausalLM

    product.keep(Race.won_by("bfloat16"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).bfloat16()


def outputs(model, padded):
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 7:] -= padded
    model.zero_grad()
    logits = model(input_ids=torch.arange(24).view(2, 12) + 3, attention_mask=mask).logits[mask.bool()]
    logits.double().square().sum().backward()
    return logits.detach().double(), *(layer.self_attn.k_proj.weight.grad.double() for layer in model.model.layers)


@needs_pairs
@pytest.mark.long
@pytest.mark.parametrize("padded", [0, 1])
def test_a_model_errs_as_with_torchs_attention(model, padded, monkeypatch):
    exact, theirs = outputs(deepcopy(model).double(), padded), outputs(deepcopy(model), padded)
    assert not widen(model) and model.config._attn_implementation == NAME
    called = []
    taken = pair_attention._Attention.apply
    monkeypatch.setattr(pair_attention._Attention, "apply", lambda *args: called.append(args) or taken(*args))
    for wanted, other, own in zip(exact, theirs, outputs(model, padded), strict=True):
        assert (own - wanted).norm() < 1.33 * (other - wanted).norm()  # the same roundings; a third for luck
    assert len(called) == 2


def drawn(tokens=6, head_dim=32, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, tokens, head_dim, generator=g).to(dtype) for _ in range(3)]


CAUSAL = torch.full((1, 1, 6, 6), -torch.inf).triu(1).bfloat16()


@pytest.mark.parametrize(
    ("inputs", "mask", "options"),
    [
        (drawn(tokens=1), None, {}),
        (drawn(head_dim=16), None, {}),
        (drawn(dtype=torch.float32), None, {}),
        (drawn(), CAUSAL, {}),
        (drawn(), None, {"is_causal": False}),
        (drawn(), None, {"position_bias": CAUSAL}),
    ],
    ids=["one token", "small heads", "float32", "mask of numbers", "not causal", "bias"],
)
def test_other_calls_have_torchs_bits(inputs, mask, options):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    module = torch.nn.Module()
    wanted = sdpa_attention_forward(module, *inputs, mask, **options)[0]
    assert torch.equal(attend(module, *inputs, mask, **options)[0], wanted)


def test_dropout_is_torchs():
    attended = [attend(torch.nn.Module(), *drawn(), None, dropout=0.5)[0] for _ in range(2)]
    assert not torch.equal(*attended)


def test_without_the_instruction_or_the_kernels_attention_stays_torchs(model, monkeypatch):
    monkeypatch.setattr("qlora_lab.model.wide.has_pairs", lambda: False)
    assert not widen(model) and model.config._attn_implementation == "sdpa"


@needs_pairs
def test_a_resumed_run_attends_as_it_began(model):
    """A checkpoint of an earlier version, or of a model made without `load`, says sdpa."""
    began = arithmetic(model)
    assert began["attention"] == "sdpa"
    widen(model)
    adopt_arithmetic(model, began)
    assert model.config._attn_implementation == "sdpa"
    adopt_arithmetic(model, began | {"attention": NAME})
    assert model.config._attn_implementation == NAME
