"""What a merge into 4 bits would keep at several sizes of the change, compared with real merges."""

import math
from dataclasses import replace

import pytest
import torch

from qlora_lab.adapters.lora import LoRALinear, add_lora
from qlora_lab.export import survival as module
from qlora_lab.export.advice import advice
from qlora_lab.export.merge import merge
from qlora_lab.export.parity import Change, Parity
from qlora_lab.export.survival import survival
from qlora_lab.model.load import load
from qlora_lab.quant.quantize import dequantize

IDS = torch.arange(3, 40)[None]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*are in 4 bits;"),  # a toy is mostly embedding
]


@pytest.fixture
def adapted(tmp_path, tiny_llama, tokenizer):
    """A model in 4 bits, with an adapter that changes its answers."""
    tiny_llama.bfloat16().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, _ = load(tmp_path / "model", dtype=torch.float32, progress=False)
    add_lora(model, r=2, alpha=8)
    generator = torch.Generator().manual_seed(1)
    for layer in adapters(model):
        layer.lora_B.data.normal_(std=0.1, generator=generator)
    return model


def adapters(model):
    return [layer for layer in model.modules() if isinstance(layer, LoRALinear)]


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.long
@pytest.mark.parametrize("factor", [1, 4])
def test_a_report_is_that_of_a_merge(adapted, tokenizer, tmp_path, factor):
    """Of the adapter times the factor. In float32 on both sides."""
    before = logits(adapted)
    survived = survival(adapted, tokenizer, [factor], progress=False)
    assert torch.equal(logits(adapted), before)
    for layer in adapters(adapted):
        layer.scaling *= factor  # 1, 4: exact
    made = merge(adapted, tmp_path / "out", "requantised", anyway=True, progress=False)
    assert survived.reports[factor].layers == made.layers
    for name in ("kl", "adapter_kl", "perplexity_before", "perplexity_after"):
        assert getattr(survived.reports[factor], name) == pytest.approx(getattr(made, name), rel=1e-4)


@pytest.mark.long
def test_sizes_and_a_larger_change_moves_more_codes(adapted, tokenizer):
    survived = survival(adapted, tokenizer, (0.01, 1, 100), progress=False)
    layer = adapted.model.layers[1].mlp.up_proj
    size = (layer.scaling * layer.lora_B @ layer.lora_A).norm() / dequantize(layer.base.weight, torch.float32).norm()
    assert survived.sizes["model.layers.1.mlp.up_proj"] == pytest.approx(size.item(), rel=1e-5)
    assert len(survived.sizes) == 14 and min(survived.sizes.values()) < survived.size < max(survived.sizes.values())
    moved = [report.nibbles_changed for report in survived.reports.values()]
    cosines = [report.cosine for report in survived.reports.values()]
    assert list(survived.reports) == [0.01, 1, 100]
    assert moved == sorted(moved) and cosines == sorted(cosines) and moved[0] < 0.01 and cosines[2] > 0.9


def test_an_error_leaves_the_model_as_it_was(adapted, tokenizer, monkeypatch):
    before = logits(adapted)
    real = module.merged_in_4_bits
    done = []

    def failing(*given):
        done.append(1)
        if len(done) == 5:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(module, "merged_in_4_bits", failing)
    with pytest.raises(KeyboardInterrupt):
        survival(adapted, tokenizer, progress=False)
    assert torch.equal(logits(adapted), before)


def test_errors_teach(adapted, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"no factor is given: give some, such as \(1, 2, 4\)"):
        survival(adapted, tokenizer, ())
    for factor in (0, -1, math.nan, "2", True):
        with pytest.raises(ValueError, match="factor.* a number above 0 and at most 1,000,000"):
            survival(adapted, tokenizer, [1, factor])
    whole, _ = load(tmp_path / "model", codebook=None, dtype=torch.float32, progress=False)
    with pytest.raises(ValueError, match="this model has no adapter"):
        survival(whole, tokenizer)
    with pytest.raises(ValueError, match="q_proj is not in 4 bits, so nothing is requantised: load the model with"):
        survival(add_lora(whole), tokenizer)


# --------------------------------------------------------------------------------------------------------------- advice

GOOD = Parity("dequantised", 0.002, 0.12, 0.97, 18.5, 18.8, 192, 0.03, {"q_proj": Change(0.85)})
OTHER = replace(GOOD, target="original", kl=0.39)
ERASED = replace(GOOD, target="requantised", kl=0.119, layers={"q_proj": Change(0.01, 0.004)})


@pytest.mark.parametrize(
    ("reports", "first"),
    [
        ([OTHER, GOOD, ERASED], "Choose dequantised: it keeps the fine-tuning in two bytes a weight."),
        ([GOOD, replace(ERASED, kl=0.01)], "Choose requantised: it keeps the fine-tuning in half a byte a weight."),
        ([replace(OTHER, kl=0.03), ERASED], "Choose original: it keeps the fine-tuning in two bytes a weight."),
        ([ERASED, OTHER], "No merge keeps the fine-tuning: keep the adapter beside its 4-bit base."),
    ],
)
def test_the_advice_follows_the_gate_and_says_the_numbers(reports, first):
    said, *lines = advice(reports).splitlines()
    assert said == first and len(lines) == len(reports)
    if reports[0] is OTHER and reports[1] is GOOD:
        assert lines == [
            "- requantised is refused: its answers are 0.119 nats a token away, where the adapter itself changed 0.12; "
            "0.4% of the codes moved.",
            "- dequantised passes: its answers are 0.002 nats a token away, where the adapter itself changed 0.12.",
            "- original is refused: its answers are 0.39 nats a token away, where the adapter itself changed 0.12.",
        ]


def test_advice_chooses_by_the_verdict():
    """A small change that rounding hides in the answers, but that arrived in the weights, is kept."""
    small = replace(GOOD, kl=9.6e-5, base_kl=9.8e-5, adapter_kl=1.2e-6, layers={"q_proj": Change(0.1, None, 0.99)})
    assert small.verdict == "kept" and advice([small]).startswith("Choose dequantised: ")
    unknown = replace(small, rounding_kl=2e-6)
    assert unknown.verdict == "cannot be told" and advice([unknown]).startswith("No merge keeps the fine-tuning: ")


def test_advice_needs_one_report_of_a_target():
    with pytest.raises(ValueError, match="no report is given: give those that merge returns"):
        advice([])
    with pytest.raises(ValueError, match="two reports are of target 'original': give one for each target"):
        advice([OTHER, GOOD, OTHER])
