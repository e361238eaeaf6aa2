"""Bytes of weights, stored and active: counted by hand, and equal to what a loaded model holds."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lab.adapters.lora import add_lora
from qlora_lab.memory.weights import EXPERTS, LINEAR, measured_weights, predicted_weights
from qlora_lab.model.experts import stacks_of
from qlora_lab.model.linear4bit import linears_to_quantise
from qlora_lab.model.load import load
from qlora_lab.model.quantized_folder import quantize_folder
from qlora_lab.quant.plan import Candidate, Plan
from tests.model.families import tiny

SLOW = ["Mixtral", "Qwen3Moe", "Llama4Text", "GPT2", "Qwen2"]
THREE_BITS = {"codebook": "int3", "block_size": 32, "double_quant": False}


def saved(name, folder, tokenizer, **options):
    tiny(name, vocab_size=280, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["Qwen2Moe", "GptOss", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
@pytest.mark.parametrize("options", [{}, THREE_BITS, {"codebook": None}])
def test_predicted_is_what_a_loaded_model_holds(tmp_path, tokenizer, name, options):
    folder = saved(name, tmp_path / "model", tokenizer)
    options = {"block_size": 16} | options
    model, _ = load(folder, dtype=torch.bfloat16, device="cpu", progress=False, **options)
    assert predicted_weights(folder, **options) == measured_weights(model)


def test_a_mixture_by_hand(tmp_path, tokenizer):
    folder = saved("Mixtral", tmp_path / "model", tokenizer, num_local_experts=4, num_experts_per_tok=1)
    ledger = predicted_weights(folder, block_size=16)
    rows = {row.what: row for row in ledger.rows}
    # two layers of four experts: gate and up 64 x 16, down 16 x 32; half a byte a code, one byte for a constant of 16,
    # and for each matrix a scale and an offset of 4 bytes (at most 64 constants: one group of 256)
    expert = (64 * 16 + 16 * 32) // 2 + (64 * 16 + 16 * 32) // 16 + 2 * 8
    assert rows[EXPERTS].stored == 2 * 4 * expert and rows[EXPERTS].active == 2 * 1 * expert
    assert rows[EXPERTS].weights == 2 * 4 * 3 * 16 * 32
    assert rows[LINEAR].stored == rows[LINEAR].active == 2 * 4 * (16 * 16 // 2 + 16 * 16 // 16 + 8)
    others = ledger.stored - rows[EXPERTS].stored
    assert ledger.active == others + rows[EXPERTS].active and (ledger.experts, ledger.experts_per_token) == (4, 1)
    assert ledger.to_dict()["stored"] == ledger.stored and ledger.to_dict()["rows"][0]["what"] == EXPERTS


@pytest.mark.long
def test_a_folder_in_4_bits_keeps_its_options(tmp_path, tokenizer):
    folder = saved("Mixtral", tmp_path / "model", tokenizer)
    out = quantize_folder(folder, tmp_path / "small", "fp4", 32, False, progress=False)
    model, _ = load(out, dtype=torch.bfloat16, device="cpu", progress=False)
    assert predicted_weights(out) == measured_weights(model) != predicted_weights(folder)
    linears = {path: layer.weight.numel() for path, layer in linears_to_quantise(tiny("Mixtral")).items()}
    plan = Plan("mixtral", dict.fromkeys(linears, Candidate("fp4", 32, False)), 0.0, 5.0, linears)
    mixed = quantize_folder(folder, tmp_path / "mixed", plan=plan, progress=False)
    with pytest.raises(ValueError, match="mixed is mixed by its plan.json, so layers differ: load it, and count with"):
        predicted_weights(mixed)


def test_experts_of_a_folder_in_4_bits_may_lie_there_in_16(tmp_path, tokenizer):
    """So bitsandbytes writes a mixture, and so did earlier versions."""
    folder = saved("Qwen3Moe", tmp_path / "model", tokenizer)
    (file,) = quantize_folder(folder, tmp_path / "small", block_size=16, progress=False).glob("*.safetensors")
    tensors = load_file(file)
    for path, stack in stacks_of(tiny("Qwen3Moe", vocab_size=280)).items():
        tensors = {name: t for name, t in tensors.items() if not name.startswith(path)} | {path: stack.bfloat16()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.warns(UserWarning, match="of the weights outside embeddings and head are in 4 bits"):
        model, _ = load(tmp_path / "small", dtype=torch.bfloat16, device="cpu", progress=False)
    assert predicted_weights(tmp_path / "small") == measured_weights(model)


def test_what_cannot_be_counted_is_named(tmp_path, tokenizer, monkeypatch):
    folder = saved("Mixtral", tmp_path / "model", tokenizer)
    model, _ = load(folder, block_size=16, progress=False)
    monkeypatch.setattr("qlora_lab.memory.weights.PER_TOKEN", ("another_name",))
    for count in (lambda: measured_weights(model), lambda: predicted_weights(folder)):
        with pytest.raises(ValueError, match="MixtralConfig does not say how .* routed to: it needs another_name"):
            count()
    with pytest.raises(ValueError, match="this model has adapters, .*: count before add_lora"):
        measured_weights(add_lora(model, r=2))
