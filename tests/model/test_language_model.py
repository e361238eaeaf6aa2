"""A model that sees loads as transformers loads it, its language model in 4 bits, and works on texts alone."""

import copy
import json

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from qlora_lab.adapters.lora import adapters, add_lora
from qlora_lab.measure.perplexity import perplexity
from qlora_lab.memory.predict import predict_memory
from qlora_lab.memory.weights import BESIDE, measured_weights, predicted_weights
from qlora_lab.model.empty_model import ModelError, empty_model
from qlora_lab.model.language_model import beside, language_model, parts_beside
from qlora_lab.model.linear4bit import Linear4bit, quantize_linears
from qlora_lab.model.load import load
from qlora_lab.model.quantized_folder import quantize_folder
from qlora_lab.model.share_in_4_bits import in_4_bits

TOWER, PROJECTOR = "vision_tower", "multi_modal_projector"


def quiet(folder, **options):
    return load(folder, **{"dtype": torch.float32, "device": "cpu", "progress": False, "block_size": 16} | options)


def inputs(tokenizer):
    red = Image.new("RGB", (40, 20), (255, 0, 0))  # of another size than the tower takes: the processor resizes
    return tokenizer.processor(images=[red], text=["the <image> sum"], return_tensors="pt")


def in_4_bits_of(model) -> set[str]:
    return {path.split(".")[1] for path, module in model.named_modules() if isinstance(module, Linear4bit)}


def test_unquantised_equals_transformers(llava_folder):
    model, tokenizer = quiet(llava_folder, codebook=None)
    want = LlavaForConditionalGeneration.from_pretrained(llava_folder).requires_grad_(False)
    batch = inputs(tokenizer)
    assert torch.equal(model(**batch).logits, want(**batch).logits)
    # the picture is read: another one gives other logits
    assert not torch.equal(model(**batch | {"pixel_values": -batch["pixel_values"]}).logits, want(**batch).logits)


def test_only_the_language_model_is_in_4_bits(llava_folder):
    model, tokenizer = quiet(llava_folder)
    want = quantize_linears(LlavaForConditionalGeneration.from_pretrained(llava_folder), block_size=16)
    assert torch.equal(model(**inputs(tokenizer)).logits, want(**inputs(tokenizer)).logits)
    assert in_4_bits_of(model) == {"language_model"}
    assert language_model(model) == language_model(copy.deepcopy(model)) == "model.language_model"
    assert {TOWER, PROJECTOR} == {path.split(".")[1] for path in beside(model) if path.startswith("model.")}
    assert str(in_4_bits(model)).startswith("98.5 % of the language model's weights")


@pytest.mark.parametrize("also", [(TOWER,), PROJECTOR, (PROJECTOR, TOWER)])
def test_tower_and_projector_are_quantised_when_asked_for(llava_folder, tmp_path, also):
    model, tokenizer = quiet(llava_folder, also=also)
    assert in_4_bits_of(model) == {"language_model", *([also] if isinstance(also, str) else also)}
    written = quantize_folder(llava_folder, tmp_path / "q", block_size=16, also=also, progress=False)
    mapped, own = quiet(written, codebook="nf4", block_size=16)
    assert torch.equal(mapped(**inputs(own)).logits, model(**inputs(tokenizer)).logits)
    with pytest.raises(ValueError, match=f"not with {TOWER}: leave the options out"):
        quiet(written, also=TOWER)


def test_an_interrupted_call_continues_with_the_same_parts_only(llava_folder, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qlora_lab.model.quantized_folder._finish", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize_folder(llava_folder, tmp_path / "q", also=TOWER, progress=False)
    with pytest.raises(ValueError, match="was begun with another also: repeat that call"):
        quantize_folder(llava_folder, tmp_path / "q", progress=False)
    quantize_folder(llava_folder, tmp_path / "q", also=[TOWER], progress=False)


def test_an_unknown_part_is_told_with_the_known_ones(llava_folder, folder):
    with pytest.raises(ValueError, match=f"'tower' is no part .*: choose from {PROJECTOR}, {TOWER}$"):
        quiet(llava_folder, also="tower")
    with pytest.raises(ValueError, match="'vision_tower' is no part .*: leave it out"):
        quiet(folder, also=TOWER)
    with pytest.raises(ValueError, match="also='vision_tower' is to be quantised, but codebook=None"):
        quiet(llava_folder, codebook=None, also=TOWER)


def test_adapters_go_into_the_language_model_unless_a_whole_path_says_otherwise(llava_folder):
    model, _ = quiet(llava_folder)
    paths = {path for path, _ in model.named_modules()}
    tower = next(path for path in sorted(paths) if path.startswith(f"model.{TOWER}") and path.endswith("q_proj"))
    assert {path.split(".")[1] for path in adapters(add_lora(model))} == {"language_model"}
    model, _ = quiet(llava_folder)
    assert {path.split(".")[1] for path in adapters(add_lora(model, targets="q_proj"))} == {"language_model"}
    model, _ = quiet(llava_folder)
    assert list(adapters(add_lora(model, targets=[tower]))) == [tower]


def test_it_works_on_texts_and_without_a_processor(llava_folder):
    (llava_folder / "processor_config.json").unlink()
    model, tokenizer = quiet(llava_folder)
    assert tokenizer.processor is None
    assert perplexity(model, tokenizer, "the sum of the two numbers " * 20, length=16, windows=2, progress=False) > 1


def test_a_damaged_processor_is_named(llava_folder):
    path = llava_folder / "processor_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"processor_class": "LlavaProcessor", "image_processor": 3})
    )
    with pytest.raises(ModelError, match="processor_config.json cannot be used"):
        quiet(llava_folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_counted_to_the_byte(llava_folder, dtype):
    for also in ((), (TOWER, PROJECTOR)):
        model, _ = quiet(llava_folder, dtype=dtype, also=also)
        found = measured_weights(model)
        assert predicted_weights(llava_folder, block_size=16, dtype=dtype, also=also) == found
        (beside,) = (row for row in found.rows if row.what == BESIDE)
        parts = model.model.vision_tower, model.model.multi_modal_projector
        plain = sum(p.nbytes for part in parts for p in part.parameters())
        assert beside.stored > plain if also else beside.stored == plain  # packed layers have no parameters


def test_what_a_run_costs_is_refused_by_name(llava_folder):
    with pytest.raises(
        ValueError, match="architecture 'llava', whose layers are unknown here.*counts the weights of any"
    ):
        predict_memory(llava_folder)


def test_parts_are_named_by_where_they_stand(llava_folder):
    model = empty_model(llava_folder, torch.float32)
    paths = {path for path, _ in model.named_modules()}
    assert parts_beside(model, paths).keys() == {TOWER, PROJECTOR, "lm_head"}
