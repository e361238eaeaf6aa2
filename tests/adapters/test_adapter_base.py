"""An adapter on another base than its own: a warning that names both. On its own: silence, warnings being errors."""

import json
import warnings
from copy import deepcopy

import pytest
import torch

from qlora_lab.adapters.adapter import has_adapters
from qlora_lab.adapters.adapter_base import same_model, weights_of
from qlora_lab.adapters.lora import add_lora
from qlora_lab.adapters.peft_format import load_adapter, save_adapter
from qlora_lab.model.linear4bit import quantize_linears
from qlora_lab.quant.quantize import quantize

INSTRUCT = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (INSTRUCT, INSTRUCT, True),
        (INSTRUCT, "smollm2-135m", True),  # a known name
        ("/home/me/.cache/qlora-lab/smollm2-135m", INSTRUCT, True),  # its folder
        (INSTRUCT, "/data/models/SmolLM2-135M-Instruct/", True),
        (INSTRUCT, r"C:\models\smollm2-135m-instruct", True),
        (INSTRUCT, "/hub/models--HuggingFaceTB--SmolLM2-135M-Instruct/snapshots/0123456789abcdef", True),
        ("unsloth/llama-3.2-3b-instruct-bnb-4bit", "meta-llama/Llama-3.2-3B-Instruct", True),
        ("unsloth/qwen3-8b-unsloth-bnb-4bit", "Qwen/Qwen3-8B", True),
        (INSTRUCT, "HuggingFaceTB/SmolLM2-135M", False),
        (INSTRUCT, "HuggingFaceTB/SmolLM2-360M-Instruct", False),
        ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf", False),
        ("runs/a", "runs/b", False),
    ],
)
def test_names_of_one_model(a, b, same):
    assert same_model(a, b) is same and same_model(b, a) is same


def test_a_dot_is_the_folder_that_one_is_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert same_model(".", str(tmp_path)) and not same_model(".", "elsewhere")


@pytest.fixture
def saved(tmp_path):
    """(model, name) -> the folder of its adapter."""

    def save(model, name=None, **changes):
        model = add_lora(deepcopy(model), r=2)
        model.name_or_path = name
        folder = save_adapter(model, tmp_path / "adapter")
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))
        return folder

    return save


def test_another_name_is_told_and_the_adapter_loads(saved, tiny_llama):
    folder = saved(tiny_llama, "org/one")
    tiny_llama.name_or_path = "org/another"
    with pytest.warns(UserWarning) as caught:
        load_adapter(tiny_llama, folder)
    assert [str(one.message) for one in caught] == [
        f"the adapter in {folder} was trained on org/one, but this model is org/another: "
        "load org/one, unless they are the same"
    ]
    assert caught[0].filename == __file__ and has_adapters(tiny_llama)


@pytest.mark.parametrize(("theirs", "ours"), [("org/one", "/models/one"), (None, "org/one"), ("org/one", "")])
def test_the_same_name_and_an_unknown_one_are_silent(saved, tiny_llama, theirs, ours):
    folder = saved(tiny_llama, theirs)
    tiny_llama.name_or_path = ours
    load_adapter(tiny_llama, folder)


def test_another_revision_is_told(saved, tiny_llama):
    folder = saved(tiny_llama, "org/one", revision="v2")
    with pytest.warns(
        UserWarning, match="was trained on revision v2 of org/one: make sure that this model is the same"
    ):
        load_adapter(tiny_llama, folder)


def test_main_is_no_revision_to_tell(saved, tiny_llama):
    load_adapter(tiny_llama, saved(tiny_llama, "org/one", revision="main"))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (("nf4", 64), ("fp4", 64)),
        (("nf4", 64), ("nf4", 32)),
        (("nf4", 64), None),
        (None, ("nf4", 64)),
    ],
)
def test_another_code_table_is_told(saved, tiny_llama, theirs, ours):
    def base(options):
        return quantize_linears(deepcopy(tiny_llama), *options) if options else deepcopy(tiny_llama)

    def words(options):
        return f"{options[0]}, block size {options[1]}" if options else "16 or 32 bits"

    folder = saved(base(theirs))
    load_adapter(base(theirs), folder)
    with pytest.warns(UserWarning) as caught:
        load_adapter(base(ours), folder)
    (told,) = (str(one.message) for one in caught)
    assert f"trained beside weights in {words(theirs)}, but here they are in {words(ours)}: load the" in told


def test_double_quantization_is_not_told(saved, tiny_llama):
    folder = saved(quantize_linears(deepcopy(tiny_llama), double_quant=True))
    load_adapter(quantize_linears(tiny_llama, double_quant=False), folder)


def test_what_peft_saved_says_nothing_of_tables(tmp_path, tiny_llama):
    from peft import LoraConfig, get_peft_model

    get_peft_model(deepcopy(tiny_llama), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    load_adapter(quantize_linears(tiny_llama), tmp_path)


def test_tables_made_by_hand_and_mixes_are_told_apart():
    weight = torch.randn(8, 64)
    a, b = (quantize(weight, torch.tensor([-1, middle, 1]), 32) for middle in (0.0, 0.1))
    plain = weight
    assert weights_of([a]) == weights_of([a, a]) != weights_of([b])
    assert weights_of([a]).startswith("custom ") and weights_of([plain]) == "16 or 32 bits"
    assert weights_of([plain, a, plain]) == f"2 x 16 or 32 bits; 1 x {weights_of([a])}"
    assert weights_of([plain, a]) != weights_of([a, b])


def test_as_an_error_it_leaves_the_model_as_it_was(saved, tiny_llama):
    folder = saved(tiny_llama, "org/one")
    tiny_llama.name_or_path = "org/another"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="org/another"):
            load_adapter(tiny_llama, folder)
    assert not has_adapters(tiny_llama)
