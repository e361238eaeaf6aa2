"""The default model, for real: peak memory of the load, and an adapter that PEFT reads."""

import sys

import pytest
import torch

import qlora_lab as ql
from qlora_lab.adapters.lora import adapters
from qlora_lab.model.linear4bit import Linear4bit
from qlora_lab.quant.quantize import dequantize
from tests import warm

pytestmark = pytest.mark.slow

MEASURE = """
import resource, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast
import qlora_lab.model.load as models
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
bare = peak()
model, _ = models.load(sys.argv[1], dtype=torch.bfloat16, progress=False)
packed = [m.weight for m in model.modules() if type(m).__name__ == "Linear4bit"]
quantised = sum(q.nbytes for q in packed) + sum(p.nbytes for p in model.parameters())
full = sum(2 * q.numel for q in packed) + sum(p.nbytes for p in model.parameters())
largest = max([2 * q.numel for q in packed] + [p.nbytes for p in model.parameters()])
print(peak() - bare, quantised, largest, full)
"""
SLACK = 300 * 2**20


def peak_of_load(folder) -> list[int]:
    return [int(x) for x in warm.run([sys.executable, "-c", MEASURE, folder], check=True).stdout.split()]


def test_peak_memory_of_the_load():
    grown, quantised, largest, _ = peak_of_load("smollm2-135m")
    assert grown <= quantised + largest + SLACK


def test_the_full_model_is_never_in_memory(tmp_path, tokenizer):
    """A model so large that its bf16 weights alone would break the bound (those of SmolLM2 would not)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=280, **shape)).bfloat16()
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape[-1]) * 0.02)  # rows alike: quick to draw, as good to load
    model.save_pretrained(tmp_path / "large", max_shard_size="300MB")
    tokenizer.save_pretrained(tmp_path / "large")
    del model
    grown, quantised, largest, full = peak_of_load(str(tmp_path / "large"))
    assert full > quantised + largest + SLACK, "the model is too small to prove anything"
    assert grown <= quantised + largest + SLACK


@pytest.mark.parametrize(
    "codebook, answer", [(None, "The capital of France is Paris."), ("nf4", "The capital of France is")]
)
def test_it_answers(codebook, answer):
    model, tokenizer = ql.load("smollm2-135m", codebook, progress=False)
    said = ql.generate(model, tokenizer, "What is the capital of France?", max_new_tokens=12)
    assert said == answer if codebook is None else said.startswith(answer) and "Paris" in said


def test_peft_reads_the_adapter_on_the_dequantised_base(tmp_path):
    """Equal to bf16 rounding: no farther apart than the same model is when it computes in bf16 and in float32.

    PEFT multiplies its float32 adapter in float32, this library in bf16.
    """
    from peft import PeftModel

    model, tokenizer = ql.load("smollm2-135m", dtype=torch.bfloat16, progress=False)
    ql.add_lora(model, r=16, alpha=16)
    g = torch.Generator().manual_seed(0)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_(std=0.5, generator=g)
    ql.save_adapter(model, tmp_path / "adapter")

    plain, _ = ql.load("smollm2-135m", dtype=torch.bfloat16, progress=False)
    ids = tokenizer("def add(a, b):\n    return a + b", return_tensors="pt").input_ids
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, Linear4bit):
            linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.bfloat16)
            linear.weight.data = dequantize(layer.weight, torch.bfloat16)
            plain.set_submodule(name, linear)
    with torch.no_grad():
        base = plain(ids).logits.float()
        adapted = PeftModel.from_pretrained(plain, tmp_path / "adapter")
        theirs = adapted(ids).logits.float()
        exact = adapted.float()(ids).logits
        ours = model(ids).logits.float()
    rounding, moved, floor = ((x - theirs).norm() / theirs.norm() for x in (ours, base, exact))
    assert rounding < 1.5 * floor and moved > 10 * rounding, f"{rounding=:.4f} {floor=:.4f} {moved=:.4f}"
