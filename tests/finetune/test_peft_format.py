"""Adapter folders: read by PEFT with the same logits, strict, and never half-written."""

import json
import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_lab.finetune.files import replacing_folder
from qlora_lab.finetune.linear4bit import quantize_linears
from qlora_lab.finetune.lora import adapters, add_lora
from qlora_lab.finetune.peft_format import load_adapter, save_adapter
from qlora_lab.quant.quantize import dequantize

IDS = torch.arange(3, 30)[None]


def trained(model, **kwargs):
    """An adapter that does something, as after training."""
    add_lora(model, **{"r": 4, "alpha": 8, **kwargs})
    g = torch.Generator().manual_seed(1)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_(std=0.2, generator=g)
    return model


def dequantised(model):
    """The same model with plain linear layers, as PEFT needs it."""
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "Linear4bit":
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight.data = dequantize(layer.weight, torch.float32)
            model.set_submodule(name, plain)
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["model.layers.1.mlp.up_proj"]])
def test_peft_loads_it_and_agrees(tmp_path, tiny_llama, targets):
    from peft import PeftModel

    base = quantize_linears(tiny_llama)
    plain = dequantised(deepcopy(base))
    ours = trained(base, targets=targets)
    save_adapter(ours, tmp_path / "adapter")
    with torch.no_grad():
        before = plain(IDS).logits
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter")(IDS).logits
        torch.testing.assert_close(ours(IDS).logits, theirs, rtol=1e-5, atol=1e-5)
    assert (theirs - before).abs().max() > 0.1  # the adapter is at work


def test_what_peft_saves_is_read(tmp_path, tiny_llama):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = get_peft_model(deepcopy(tiny_llama), config)
    theirs.save_pretrained(tmp_path / "adapter")
    ours = load_adapter(tiny_llama, tmp_path / "adapter")
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)


def test_round_trip_into_a_fresh_and_into_an_adapted_model(tmp_path, tiny_llama):
    fresh, other = deepcopy(tiny_llama), add_lora(deepcopy(tiny_llama), r=4, alpha=8, seed=9)
    want = trained(tiny_llama)
    save_adapter(want, tmp_path / "adapter")
    for model in (fresh, other):
        assert torch.equal(load_adapter(model, tmp_path / "adapter")(IDS).logits, want(IDS).logits)


@pytest.fixture
def saved(tmp_path, tiny_llama):
    save_adapter(trained(deepcopy(tiny_llama)), tmp_path / "adapter")
    return tmp_path / "adapter"


def rewrite(folder, change):
    stored = load_file(folder / "adapter_model.safetensors")
    change(stored)
    save_file(stored, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(KEY), f"{KEY} missing from the file"),
        (lambda t: t.update(stray=torch.ones(1)), "stray not in the model"),
        (lambda t: t.update({KEY: torch.ones(2, 2)}), f"{KEY} of another shape"),
    ],
)
def test_keys_that_differ_are_named_and_change_nothing(saved, tiny_llama, change, message):
    before = tiny_llama(IDS).logits
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny_llama, saved)
    assert torch.equal(tiny_llama(IDS).logits, before)


def test_strength_comes_from_the_file(saved, tiny_llama):
    model = add_lora(tiny_llama, r=4, alpha=64, dropout=0.5)
    load_adapter(model, saved)
    assert {(layer.alpha, layer.scaling, layer.dropout.p) for layer in adapters(model).values()} == {(8, 2.0, 0.0)}


def test_other_peoples_files_are_not_replaced(tmp_path, tiny_llama):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds 'notes.txt', which is no part of an adapter"):
        save_adapter(trained(tiny_llama), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("broken", ["[1]", "{}", '{"r": 4, "lora_alpha": 8}'])
def test_an_incomplete_configuration_is_named(saved, tiny_llama, broken):
    (saved / "adapter_config.json").write_text(broken)
    with pytest.raises(ValueError, match="adapter_config.json lacks (a JSON object|r|target_modules)"):
        load_adapter(tiny_llama, saved)


def test_other_errors(saved, tiny_llama, tmp_path):
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        load_adapter(tiny_llama, tmp_path)
    with pytest.raises(ValueError, match="has no adapter: call"):
        save_adapter(tiny_llama, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    config = json.loads((saved / "adapter_config.json").read_text())
    for change, what in (({"use_dora": True}, "use_dora"), ({"peft_type": "IA3"}, "IA3")):
        (saved / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"uses {what}: only plain LoRA"):
            load_adapter(tiny_llama, saved)
    (saved / "adapter_model.safetensors").write_bytes(b"\x09")
    with pytest.raises(ValueError, match=f"{re.escape(str(saved))} cannot be read"):
        load_adapter(tiny_llama, saved)


def test_a_failed_save_leaves_the_old_folder(saved, monkeypatch, tiny_llama):
    before = (saved / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr("qlora_lab.finetune.peft_format.save_file", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(trained(tiny_llama, alpha=1), saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "content").write_text("old")
    rename = Path.rename

    def full_disk(self, to):
        if self.name == "new":
            raise OSError("no space left")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(OSError, match="no space"), replacing_folder(tmp_path / "a"):
        pass
    assert (tmp_path / "a" / "content").read_text() == "old"


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    for content in ("first", "second"):
        with replacing_folder(tmp_path / "a" / "b") as staged:
            assert not list(staged.iterdir())
            (staged / content).write_text(content)
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["second"]
