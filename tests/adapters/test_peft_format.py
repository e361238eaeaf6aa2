"""Adapter folders: read by PEFT with the same logits, strict, and never half-written."""

import json
import os
import re
import shutil
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qlora_lab as ql
from qlora_lab.adapters.lora import adapt, adapters, add_lora
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.data.examples import Example
from qlora_lab.files import disk
from qlora_lab.files.replace import replacing_folder
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.quant.quantize import dequantize

IDS = torch.arange(3, 30)[None]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


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
        (lambda t: t.pop(KEY), f"is not whole: {KEY} missing from the file"),
        (lambda t: t.update(stray=torch.ones(1)), "holds stray, but this model has no such layer"),
        (
            lambda t: t.update({KEY: torch.ones(2, 2)}),
            r"lora_A has shape \(2, 2\), but with r=4 .* \(4, 32\)",
        ),
        (lambda t: t.update({KEY: torch.ones(0)}), r"down_proj.lora_A has shape \(0,\)"),  # shards of ZeRO-3
        (lambda t: t[KEY][1, 2].fill_(float("nan")), r"has NaN or infinity in model.layers.0.mlp.down_proj.lora_A"),
        (lambda t: t.clear(), "holds no lora_A and lora_B"),
        (
            lambda t: t.update({KEY.replace(".weight", ".default.weight"): t.pop(KEY)}),
            "lora_A.default.weight, but for a linear layer only",
        ),
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


def test_layers_that_differ_are_saved_by_pattern(tmp_path, tiny_llama):
    """PEFT and load_adapter read each layer's own rank and strength; layer 1 is not layer 11."""
    from peft import PeftModel

    paths = {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("up_proj", "down_proj")}
    odd = "model.layers.1.mlp.up_proj"
    ours = adapt(deepcopy(tiny_llama), {path: (7, 3) if path == odd else (4, 8) for path in sorted(paths)})
    for layer in adapters(ours).values():
        layer.lora_B.data.fill_(0.1)
    config = json.loads((save_adapter(ours, tmp_path / "adapter") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert len(config["rank_pattern"]) == len(config["alpha_pattern"]) == 1
    again = load_adapter(deepcopy(tiny_llama), tmp_path / "adapter")
    assert {path: (layer.r, layer.alpha) for path, layer in adapters(again).items()} == {
        path: (7, 3) if path == odd else (4, 8) for path in paths
    }
    assert torch.equal(again(IDS).logits, ours(IDS).logits)
    theirs = PeftModel.from_pretrained(deepcopy(tiny_llama), tmp_path / "adapter")
    torch.testing.assert_close(theirs(IDS).logits, ours(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("one_thread")
def test_an_adapter_with_ranks_of_its_own_is_trained_on_and_saved(tmp_path, tiny_llama, tokenizer):
    """What was read can be written: it would be a pity to learn of it after the last step."""
    strengths = {"model.layers.0.mlp.up_proj": (2, 4), "model.layers.1.mlp.up_proj": (5, 8), "lm_head": (3, 4)}
    save_adapter(adapt(deepcopy(tiny_llama), strengths), tmp_path / "start")
    model = load_adapter(deepcopy(tiny_llama), tmp_path / "start")
    examples = [Example((("user", f"{i}?"), ("assistant", f"{i} and {i}"))) for i in range(4)]
    run = ql.finetune(model, tokenizer, examples, steps=2, out=tmp_path / "run", progress=False)
    again = load_adapter(deepcopy(tiny_llama), run.adapter)
    assert torch.equal(again(IDS).logits, model(IDS).logits) and not torch.equal(
        again(IDS).logits, tiny_llama(IDS).logits
    )
    recorded = json.loads((tmp_path / "run" / "settings.json").read_text())["adapter"]
    assert (recorded["r"], recorded["alpha"]) == ([2, 5, 3], [4, 8, 4])  # what a resume compares


def test_layers_with_different_dropout_are_not_saved(tmp_path, tiny_llama):
    ours = trained(tiny_llama, dropout=0.1)
    next(iter(adapters(ours).values())).set_strength(8, 0.2)
    with pytest.raises(ValueError, match=r"layers differ in dropout \(\[0.1, 0.2\]\), but a folder holds one"):
        save_adapter(ours, tmp_path / "adapter")


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"r": 2}, "has r=4 at .*, but the model's own has r=2: load the model without"),
        ({"targets": "q_proj"}, "has r=4 at .*, but the model's own has nothing"),
        ({"targets": ALL}, "has nothing at lm_head, but the model's own has r=4"),
    ],
)
def test_another_adapter_than_the_models_own_is_refused(saved, tiny_llama, own, message):
    model = add_lora(tiny_llama, **{"r": 4} | own)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, saved)


def test_names_that_other_modules_share_are_saved_as_paths(tmp_path):
    """PEFT would look for `proj` in each of them."""
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"proj": nn.Linear(8, 8)}), "b": nn.ModuleDict({"proj": nn.Conv2d(1, 1, 1)})}
    )
    save_adapter(add_lora(model, r=2), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["a.proj"]


def test_other_peoples_files_are_not_replaced(tmp_path, tiny_llama):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(ValueError, match="holds 'notes.txt', which is not part of an adapter"):
        save_adapter(trained(tiny_llama), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("[1]", r"adapter_config.json holds \[1\]: it must be a JSON object"),
        ("{}", "has peft_type=None"),
        ('{"peft_type": "LORA", "lora_alpha": 8}', "has no r in its configuration"),
        ('{"peft_type": ', "cannot be read"),
    ],
)
def test_an_incomplete_configuration_is_named(saved, tiny_llama, broken, message):
    (saved / "adapter_config.json").write_text(broken)
    with pytest.raises(ValueError, match=message):
        load_adapter(tiny_llama, saved)


def test_a_folder_without_an_adapter_says_what_it_has_instead(saved, tiny_llama, tmp_path):
    def message():
        with pytest.raises(FileNotFoundError) as caught:
            load_adapter(tiny_llama, folder)
        return str(caught.value)

    folder = tmp_path  # as a run's, or a repository with several
    assert message() == f"{tmp_path} has no adapter_config.json, but its subfolders adapter have: name one of them"
    for name in ("b", "c", "d"):
        shutil.copytree(saved, tmp_path / name)
    assert "but its subfolders adapter, b, c and 1 more have: name" in message()
    folder = saved / "adapter_model.safetensors"
    assert message().startswith(f"{folder} is not a folder: name a local folder with adapter_config.json and")
    renamed = folder.rename(saved / "model-00001-of-00002.safetensors")
    folder = saved
    assert message().endswith(
        "has no adapter_model.safetensors, but model-00001-of-00002.safetensors: merge them into one file of this name"
    )
    renamed.rename(saved / "adapter_model.bin")
    assert (
        "has adapter_model.bin, a pickle (safe_serialization=False), which can run code and is not read: load"
        in message()
    )
    (saved / "adapter_model.bin").unlink()
    assert message().endswith("has no adapter_model.safetensors, so it is not an adapter")
    (saved / "adapter_config.json").unlink()
    assert message().endswith("has no adapter_config.json, so it is not an adapter")


def test_other_errors(saved, tiny_llama, tmp_path):
    with pytest.raises(ValueError, match="has no adapter: call"):
        save_adapter(tiny_llama, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    config = json.loads((saved / "adapter_config.json").read_text())
    for change, what in (({"use_qalora": True}, "True"), ({"peft_type": "IA3"}, "'IA3'")):
        (saved / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=f"={what} .*but only LoRA, rsLoRA and DoRA"):
            load_adapter(tiny_llama, saved)
    (saved / "adapter_model.safetensors").write_bytes(b"\x09")
    with pytest.raises(ValueError, match=f"{re.escape(str(saved))} cannot be read"):
        load_adapter(tiny_llama, saved)


def test_a_failed_save_leaves_the_old_folder(saved, monkeypatch, tiny_llama):
    before = (saved / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr("qlora_lab.files.tensor_file.save_file", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(trained(tiny_llama, alpha=1), saved)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_a_readme_of_the_user_stays(tmp_path, tiny_llama):
    """Also where it is all that the folder holds."""
    model = trained(tiny_llama)
    (tmp_path / "README.md").write_text("what this project is about")
    for _ in range(2):
        save_adapter(model, tmp_path)
        assert (tmp_path / "README.md").read_text() == "what this project is about"
    names = {"README.md", "adapter_config.json", "adapter_model.safetensors", "qlora-lab.sha256"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize("name", ["notes.md", "README.md/notes.md", "adapter_config.json/notes.md", ".adapter-old"])
def test_a_folder_with_files_of_the_user_is_no_place_for_an_adapter(tmp_path, tiny_llama, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds '{name.split('/')[0]}', which is not part of an adapter"):
        save_adapter(trained(tiny_llama), tmp_path)
    assert (tmp_path / name).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_an_adapter_follows_a_link(tmp_path, tiny_llama):
    (tmp_path / "disk" / "adapter").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "adapter")
    model = trained(tiny_llama)
    for _ in range(2):
        save_adapter(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and len(list((tmp_path / "disk").rglob("*"))) == 4


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "content").write_text("old")
    rename = disk.rename

    def full_disk(path, to):
        if path.name == "new":
            raise OSError("no space left")
        rename(path, to)

    monkeypatch.setattr(disk, "exchange", lambda a, b: False)
    monkeypatch.setattr(disk, "rename", full_disk)
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


def test_one_adapter_has_one_file(tmp_path, tiny_llama):
    """Byte by byte, as a run that was resumed is compared; safetensors orders its metadata at random."""
    save_adapter(trained(quantize_linears(tiny_llama)), tmp_path / "adapter")
    first = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    for _ in range(20):
        save_adapter(tiny_llama, tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == first


def test_what_a_killed_save_left_goes_with_the_next_one_and_nothing_else(tiny_llama, tmp_path):
    model = add_lora(tiny_llama, r=2)
    (tmp_path / ".adapter-a8s0d9f2").mkdir()  # of somebody else
    if not (child := os.fork()):
        disk.rename = lambda *_: os._exit(9)
        save_adapter(model, tmp_path / "adapter")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(list(tmp_path.iterdir())) == 3  # a lock, and the scratch that it names
    save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".adapter-a8s0d9f2", "adapter"]
