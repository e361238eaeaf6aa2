"""`--method`: what a method or a model cannot do is one line and code 2, if possible before the model is loaded."""

import json

import pytest
from transformers import PhiConfig, PhiForCausalLM

import qlora_lab as ql
from qlora_lab import cli
from qlora_lab.adapters.adapter import learned

NOT_LOADED = {  # the model does not exist
    "a prefix with checkpoints": ("prefix --gradient-checkpointing", "method prefix cannot checkpoint gradients"),
    "a packed prefix": ("prefix --packing", "method prefix cannot train on packed rows"),
    "a packed prompt": ("prompt --packing", "method prompt cannot train on packed rows"),
    "LoRA+ without LoRA": ("houlsby --lora-plus 16", "lora_plus=16.0 is for lora_B, but method houlsby has none"),
    "an option of another method": ("houlsby --r 4", "r is no option of method houlsby: its options are size"),
    "no option at all": ("bitfit --size 4", "size is no option of method bitfit: it has none"),
    "a source without loss": ("lora --source m", "source is no option of method lora"),
    "full in 4 bits": ("full", "method full needs weights that are not quantised"),
    "full in shards": ("full --codebook none --shard", "method full freezes none: leave it out"),
    "loftq in 16 bits": ("loftq --codebook none", "method loftq makes up for quantisation"),
}
LOADED = {
    "no biases": ("bitfit", "LlamaForCausalLM has no biases to train: use zero_bias"),
    "too long a prompt": ("prompt --virtual-tokens 5000", "virtual_tokens is 5000, but the model reads at most 2048"),
    "too long a prefix": ("prefix --virtual-tokens 5000", "virtual_tokens is 5000, but the model reads at most 2048"),
}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(f'{{"instruction": "double {i}", "output": "{2 * i}"}}\n' for i in range(8)))
    return path


def refused(capsys, *argv):
    """The one line that a mistake is told in."""
    capsys.readouterr()  # of fixtures
    code = cli.main([*map(str, argv), "--quiet"])
    out, err = capsys.readouterr()
    assert code == 2 and not out
    (line,) = err.splitlines()
    return line


def finetune(capsys, model, data, options):
    return refused(capsys, "finetune", "--model", model, "--data", data, "--out", data.parent / "run", *options.split())


@pytest.mark.parametrize("case", NOT_LOADED)
def test_it_is_refused_before_the_model_is_loaded(capsys, data, case):
    options, message = NOT_LOADED[case]
    assert message in finetune(capsys, "nowhere", data, f"--method {options}")
    assert not (data.parent / "run").exists()


def test_a_run_in_the_model_s_folder_is_refused(capsys, data, folder):
    out = folder / "run"
    said = refused(capsys, "finetune", "--model", folder, "--data", data, "--out", out)
    assert f"adapter lies inside {folder}, which is an input: choose a place outside of it" in said and not out.exists()


@pytest.mark.parametrize("case", LOADED)
def test_it_is_refused_by_the_model(capsys, data, folder, case):
    options, message = LOADED[case]
    assert message in finetune(capsys, folder, data, f"--method {options}")


def test_a_method_that_does_not_know_the_model(capsys, data, folder, tokenizer):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    PhiForCausalLM(PhiConfig(vocab_size=280, **shape)).save_pretrained(folder)
    line = finetune(capsys, folder, data, "--method houlsby")
    assert "houlsby knows sublayers that end in" in line and "not those of PhiForCausalLM: use lora" in line


def test_an_adapter_of_another_method(capsys, tmp_path, folder, tiny_llama):
    adapter = ql.save_adapter(ql.add_adapter(tiny_llama, "houlsby", size=2), tmp_path / "adapter")
    line = refused(capsys, "merge", folder, "--adapter", adapter, "--out", tmp_path / "merged")
    assert "has peft_type='HOULSBY' (another method), but only LoRA, rsLoRA and DoRA are read" in line
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
    line = refused(capsys, "generate", "hi", "--model", folder, "--adapter", adapter)
    assert "has peft_type='IA3' (another method)" in line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*are in 4 bits;")
def test_loftq_reads_the_original_that_it_is_told(capsys, tmp_path, folder, data):
    """A copy in 4 bits does not name it."""
    ql.quantize_folder(folder, tmp_path / "packed", progress=False)
    options = ["--method", "loftq", "--r", "2", "--steps", "1", "--batch-size", "2", "--held-out", "0", "--out"]
    argv = ["finetune", "--model", tmp_path / "packed", "--data", data, *options, tmp_path / "run"]
    assert "packed is in 4 bits already: name the original" in refused(capsys, *argv)
    assert cli.main([*map(str, argv), "--source", str(folder), "--quiet"]) == 0
    model, _ = ql.load(tmp_path / "packed", progress=False)
    ql.add_adapter(model, "loftq", r=2, source=folder, progress=False)
    first = {name: p.clone() for name, p in learned(model).items()}
    ql.load_adapter(model, tmp_path / "run" / "adapter")
    moved = max((p - first[name]).abs().max().item() for name, p in learned(model).items())
    assert 0 < moved < 1.01 * 2e-4  # one step of Adam from where LoftQ starts, at the default rate
