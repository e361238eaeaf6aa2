"""Streaming load: the same model as transformers loads, and every kind of broken folder named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qlora_lab.kernels import product
from qlora_lab.model import load as models
from qlora_lab.model.linear4bit import Linear4bit, quantize_linears
from qlora_lab.model.load import fast_dtype, load
from qlora_lab.quant.quantize import quantize


def quiet(folder, *args, **kwargs):
    return load(folder, *args, progress=False, dtype=kwargs.pop("dtype", torch.float32), **kwargs)


IDS = torch.arange(3, 40)[None]


def test_unquantised_equals_transformers(folder):
    model, _ = quiet(folder, codebook=None)
    assert torch.equal(model(IDS).logits, LlamaForCausalLM.from_pretrained(folder)(IDS).logits)


@pytest.mark.long
@pytest.mark.parametrize("codebook", ["nf4", "fp4", "int4", "nf3"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_quantised_on_arrival_equals_quantised_after(folder, codebook, double_quant):
    model, _ = quiet(folder, codebook, 32, double_quant)
    want = quantize_linears(LlamaForCausalLM.from_pretrained(folder), codebook, 32, double_quant)
    assert torch.equal(model(IDS).logits, want(IDS).logits)
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 2 * 7
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_weights_are_quantised_from_the_precision_of_the_file(folder):
    half, _ = quiet(folder, dtype=torch.bfloat16)
    full, _ = quiet(folder)
    q, k = (m.model.layers[0].mlp.up_proj.weight for m in (half, full))
    assert q.dtype == torch.float32 and torch.equal(q.packed, k.packed)
    assert half.model.norm.weight.dtype == half.lm_head.weight.dtype == torch.bfloat16


def test_tied_head_is_the_embedding(tmp_path, tiny_llama, tokenizer):
    config = LlamaConfig(**{**tiny_llama.config.to_dict(), "tie_word_embeddings": True})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    model, _ = quiet(tmp_path / "tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    stored = load_file(tmp_path / "tied" / "model.safetensors")
    twice = stored | {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    save_file(twice, tmp_path / "tied" / "model.safetensors")
    assert torch.equal(quiet(tmp_path / "tied")[0](IDS).logits, model(IDS).logits)


def test_shards_are_read_in_turn(folder, tiny_llama):
    whole = quiet(folder)[0](IDS).logits
    (folder / "model.safetensors").unlink()
    tiny_llama.save_pretrained(folder, max_shard_size="4KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(quiet(folder)[0](IDS).logits, whole)


def test_the_tokenizer_comes_with_it(folder, tokenizer):
    text = "the sum of 12 and 3"
    assert quiet(folder)[1](text)["input_ids"] == tokenizer(text)["input_ids"]


def rewrite(folder, change):
    stored = load_file(folder / "model.safetensors")
    change(stored)
    save_file(stored, folder / "model.safetensors")


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(NORM), f"{NORM}: missing from"),
        (lambda t: t.update(stray=torch.ones(1)), "stray: not part of the model, but in"),
        (lambda t: t.update({NORM: torch.ones(3)}), rf"{NORM} has shape \(3,\), but config.json asks for \(16,\)"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight") * 0, "layers.0.mlp.up_proj.weight: missing from"),
    ],
)
def test_wrong_tensors_are_named(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(RuntimeError, match=message):
        quiet(folder)


def test_a_nan_is_named(folder):
    rewrite(folder, lambda t: t["model.layers.1.mlp.up_proj.weight"][2].fill_(torch.nan))
    with pytest.raises(RuntimeError, match=r"model.layers.1.mlp.up_proj.weight holds nan at \[2, 0\], but weights are"):
        quiet(folder)


def test_old_rotary_buffers_are_passed_over(folder):
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    quiet(folder)


def test_a_file_cut_off_is_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises((RuntimeError, ValueError), match="model.safetensors.*(cut off|unreadable)"):
        quiet(folder)


def test_a_missing_shard_is_named(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {NORM: "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((RuntimeError, ValueError), match="model-00002-of-00002.safetensors"):
        quiet(folder)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"codebook": "nf5"}, "codebook 'nf5' is not known"),
        ({"block_size": 8}, "block_size=8 is not allowed"),
        ({"dtype": torch.int8}, "dtype=torch.int8 is not supported"),
    ],
)
def test_options_are_checked_before_anything_is_read(folder, kwargs, message):
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes([2, 0, 0, 0, 0, 0, 0, 0]) + b"{}")
    with pytest.raises(ValueError, match=message):
        quiet(folder, **kwargs)


@pytest.mark.parametrize(
    "quantised, message",
    [
        ({"quant_method": "gptq", "bits": 4}, "holds a model quantised by gptq: load the original"),
        ({"quant_method": "mxfp4"}, r"by mxfp4: save it decoded, .*Mxfp4Config\(dequantize=True\)"),
        ({"quant_method": ["gptq"]}, r"holds a model quantised by \['gptq'\]: load the original"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "in 8 bits by bitsandbytes, but only 4 bits are read"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
            "not as .*leave",
        ),
    ],
)
def test_a_model_that_is_quantised_otherwise_is_refused(folder, quantised, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises((RuntimeError, ValueError), match=message):
        quiet(folder, "fp4")


def test_tensors_that_are_not_what_config_json_says(folder):
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    with pytest.raises(RuntimeError, match="is quantised by its config.json, but not its tensors"):
        quiet(folder)


def test_a_tensor_in_two_files_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    with pytest.raises(RuntimeError, match="is in model-00001-of-00002.* and in model-00002-of-00002.*: keep one"):
        quiet(folder)


def test_files_beside_the_weights_are_passed_over(folder):
    want = quiet(folder)[0](IDS).logits
    for name in ("consolidated", "adapter_model", "model-00001-of-00002"):  # transformers reads model.safetensors alone
        save_file({"layers.0.wq": torch.ones(2)}, folder / f"{name}.safetensors")
    assert torch.equal(quiet(folder)[0](IDS).logits, want)


def test_an_adapter_beside_weights_of_another_name_is_passed_over(folder):
    want = quiet(folder)[0](IDS).logits
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    save_file({"lora_A": torch.ones(2)}, folder / "adapter_model.safetensors")
    assert torch.equal(quiet(folder)[0](IDS).logits, want)


def test_a_tensor_that_changes_after_it_was_placed_is_named(folder, monkeypatch):
    monkeypatch.setattr(models, "widen", lambda model: model.model.norm.weight.fill_(1.0))
    with pytest.raises(RuntimeError, match=f"^{NORM} is no longer what was read from the files"):
        quiet(folder)
    monkeypatch.setattr(models, "widen", lambda model: model.model.layers[0].mlp.up_proj.__init__(ones()))
    with pytest.raises(RuntimeError, match="^model.layers.0.mlp.up_proj.weight is no longer what was read"):
        quiet(folder)


def ones():
    return quantize(torch.ones(32, 16), "nf4")


def test_what_nothing_gave_a_value_is_named(folder, monkeypatch):
    monkeypatch.setattr(models, "compute_buffers", lambda *_: None)
    with pytest.raises(RuntimeError, match="^model.rotary_emb.inv_freq has no value: no file holds it"):
        quiet(folder)
    lost = torch.empty(1, device="meta")
    monkeypatch.undo()
    monkeypatch.setattr(models, "widen", lambda model: setattr(model.model, "positions", lost))
    with pytest.raises(RuntimeError, match="^model.positions has no value"):
        quiet(folder)


def test_an_adapter_will_name_its_base_by_hub_id():
    assert models.public_name("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert models.public_name("some/folder") == "some/folder"


def test_cpu_dtype_is_the_faster_one(monkeypatch):
    for bfloat16, want in ((0.5, torch.bfloat16), (2.0, torch.float32), (0.95, torch.float32)):
        monkeypatch.setattr(product, "race", lambda seconds=bfloat16: product.Race(1.0, 1.0, seconds))
        fast_dtype.cache_clear()
        assert fast_dtype(torch.device("cpu")) == want
    fast_dtype.cache_clear()
