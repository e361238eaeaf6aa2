"""A model that sees loads as transformers loads it, its language model in 4 bits, and works on texts alone."""

import copy
import json

import pytest
import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration

from qlora_lab.adapters.adapter import adapters, remove_adapter
from qlora_lab.adapters.lora import add_lora
from qlora_lab.data.dataset import collate, encode, load_data
from qlora_lab.measure.perplexity import perplexity
from qlora_lab.memory.weights import BESIDE, measured_weights, predicted_weights
from qlora_lab.model.empty_model import ModelError, empty_model
from qlora_lab.model.language_model import beside, language_model, parts_beside
from qlora_lab.model.linear4bit import Linear4bit, quantize_linears
from qlora_lab.model.load import load
from qlora_lab.model.quantized_folder import quantize_folder, read_by
from qlora_lab.model.share_in_4_bits import in_4_bits
from qlora_lab.train.trainer import finetune

SLOW = pytest.mark.slow  # a case more of what another case tests fast
TOWER, PROJECTOR = "vision_tower", "multi_modal_projector"


def quiet(folder, **options):
    return load(folder, **{"dtype": torch.float32, "device": "cpu", "progress": False, "block_size": 16} | options)


def inputs(tokenizer):
    red = Image.new("RGB", (40, 20), (255, 0, 0))  # of another size than the tower takes: the processor resizes
    return tokenizer.processor(images=[red], text=["the <image> sum"], return_tensors="pt")


def in_4_bits_of(model) -> set[str]:
    return {path.split(".")[1] for path, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.long
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


@pytest.mark.long
@pytest.mark.parametrize("also", [(PROJECTOR, TOWER), *(pytest.param(n, marks=SLOW) for n in (PROJECTOR, (TOWER,)))])
def test_tower_and_projector_are_quantised_when_asked_for(llava_folder, tmp_path, also):
    model, tokenizer = quiet(llava_folder, also=also)
    assert in_4_bits_of(model) == {"language_model", *([also] if isinstance(also, str) else also)}
    written = quantize_folder(llava_folder, tmp_path / "q", block_size=16, also=also, progress=False)
    mapped, own = quiet(written, codebook="nf4", block_size=16)
    assert torch.equal(mapped(**inputs(own)).logits, model(**inputs(tokenizer)).logits)
    assert predicted_weights(written, dtype=torch.float32) == measured_weights(mapped)
    with pytest.raises(ValueError, match=f"not with {TOWER}: leave the options out"):
        quiet(written, also=TOWER)


@pytest.mark.slow
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


@pytest.mark.slow  # bitsandbytes
@pytest.mark.parametrize("also", [(), TOWER])
def test_transformers_with_bitsandbytes_reads_it_and_we_what_they_write(tmp_path, llava_folder, also):
    from transformers import BitsAndBytesConfig

    # rows of whole blocks: for others bitsandbytes decodes wrong weights on the CPU
    config = LlavaConfig.from_pretrained(llava_folder)
    for part in (config.text_config, config.vision_config):
        part.hidden_size, part.intermediate_size = 64, 128
    config.text_config.head_dim = 32
    LlavaForConditionalGeneration(config).save_pretrained(llava_folder)
    written = quantize_folder(llava_folder, tmp_path / "q", block_size=32, also=also, progress=False)
    assert read_by(written) == "QLoRA Lab, and transformers with bitsandbytes"
    ours, tokenizer = quiet(written, block_size=64)
    theirs = LlavaForConditionalGeneration.from_pretrained(written, dtype=torch.float32)
    batch = inputs(tokenizer)
    assert in_4_bits_of(ours) == {
        p.split(".")[1] for p, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"
    }
    assert (theirs(**batch).logits - ours(**batch).logits).norm() < 0.02 * ours(**batch).logits.norm()  # bf16 in theirs
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = LlavaForConditionalGeneration.from_pretrained(llava_folder, quantization_config=four, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    tokenizer.processor.save_pretrained(tmp_path / "theirs")
    ours, tokenizer = quiet(tmp_path / "theirs", block_size=64)
    assert in_4_bits_of(ours) == {"language_model", TOWER, PROJECTOR}  # they quantise all of it
    assert (theirs(**batch).logits - ours(**batch).logits).norm() < 0.02 * ours(**batch).logits.norm()


@pytest.mark.slow  # another tower
def test_gemma_3_with_images_comes_from_the_same_description(tmp_path, tokenizer):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessorPil, Gemma3Processor

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shape | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 283, "sliding_window": 8}
    text |= {"pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 1}
    vision = shape | {"image_size": 16, "patch_size": 4, "vision_use_head": False}
    marks = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    named = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", **marks)
    named.chat_template = tokenizer.chat_template
    ids = {"boi_token_index": named.boi_token_id, "eoi_token_index": named.eoi_token_id}
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=named.image_token_id, **ids
    )
    folder = tmp_path / "gemma"
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    pictures = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    Gemma3Processor(pictures, named, image_seq_length=4, chat_template=named.chat_template).save_pretrained(folder)
    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "red.png")
    model, seeing = quiet(folder)
    assert in_4_bits_of(model) == {"language_model"}
    record = {"image": str(tmp_path / "red.png"), "prompt": "<image> what?", "completion": "red"}
    batch = collate([encode(load_data([record])[0], seeing)], 0)
    with Image.open(tmp_path / "red.png") as image:
        messages = [("user", "<start_of_image> what?"), ("assistant", "red")]
        written = seeing.apply_chat_template([{"role": r, "content": c} for r, c in messages], tokenize=False)
        theirs = seeing.processor(images=[image], text=[written], add_special_tokens=False, return_tensors="pt")
    assert batch.keys() - {"labels"} == theirs.keys()  # token_type_ids: pictures are seen both ways
    for name, tensor in theirs.items():
        assert torch.equal(batch[name], tensor), name
    run = finetune(
        add_lora(model), seeing, [record], steps=4, batch_size=1, lr=1e-2, out=tmp_path / "run", progress=False
    )
    assert run.losses[-1] < run.losses[0]


def test_an_unknown_part_is_told_with_the_known_ones(llava_folder, folder):
    with pytest.raises(ValueError, match=f"'tower' is not a part .*: choose from {PROJECTOR}, {TOWER}$"):
        quiet(llava_folder, also="tower")
    with pytest.raises(ValueError, match="'vision_tower' is not a part .*: leave it out"):
        quiet(folder, also=TOWER)
    with pytest.raises(ValueError, match="also='vision_tower' is to be quantised, but codebook=None"):
        quiet(llava_folder, codebook=None, also=TOWER)
    with pytest.raises(ValueError, match="also='nonsense' is to be quantised, but codebook=None"):
        predicted_weights(llava_folder, codebook=None, also=["nonsense"])


@pytest.mark.parametrize("also", [3, None, [3]])
def test_parts_that_are_no_names_are_refused_before_any_work(also, tmp_path):
    for call in (load, predicted_weights, lambda model, also: quantize_folder(model, tmp_path / "out", also=also)):
        with pytest.raises(TypeError, match=r"also is .*, but it must be a name or a list of names$"):
            call(tmp_path / "nothing", also=also)
    assert not any(tmp_path.iterdir())


def test_adapters_go_into_the_language_model_unless_a_whole_path_says_otherwise(llava_folder):
    model, _ = quiet(llava_folder)
    paths = {path for path, _ in model.named_modules()}
    tower = next(path for path in sorted(paths) if path.startswith(f"model.{TOWER}") and path.endswith("q_proj"))
    for targets in ("all-linear", "q_proj"):
        assert {path.split(".")[1] for path in adapters(add_lora(model, targets=targets))} == {"language_model"}
        remove_adapter(model)
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


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=SLOW)])
def test_weights_are_counted_to_the_byte(llava_folder, dtype):
    for also in ((), (TOWER, PROJECTOR)):
        model, _ = quiet(llava_folder, dtype=dtype, also=also)
        found = measured_weights(model)
        assert predicted_weights(llava_folder, block_size=16, dtype=dtype, also=also) == found
        (beside,) = (row for row in found.rows if row.what == BESIDE)
        parts = model.model.vision_tower, model.model.multi_modal_projector
        plain = sum(p.nbytes for part in parts for p in part.parameters())
        assert beside.stored > plain if also else beside.stored == plain  # packed layers have no parameters


def test_parts_are_named_by_where_they_stand(llava_folder):
    model = empty_model(llava_folder, torch.float32)
    paths = {path for path, _ in model.named_modules()}
    assert parts_beside(model, paths).keys() == {TOWER, PROJECTOR, "lm_head"}
